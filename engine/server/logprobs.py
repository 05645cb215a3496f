"""Log-probabilities in OpenAI's two forms: parallel lists for completions, a list of objects for
chats."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from engine.server.workers import give_way
from engine.text.outputs import SampledToken
from engine.text.tokenizer import Tokenizer

LEAST = -9999.0
"""Log-probability of an impossible token, as in OpenAI's API. JSON has no infinity."""
PIECE = 32
"""Number of tokens with scores that are written at a time. With their alternatives this takes a
quarter of a millisecond."""


def finite(logprob: float | None) -> float | None:
    """Return ``logprob`` as a number that JSON can represent."""
    return None if logprob is None else max(logprob, LEAST)


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Return a token as text, or as ``bytes:\\xe2\\x80`` if it is not valid UTF-8, so that
    different tokens differ."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode("utf-8") if raw else f"token:{token_id}"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class CompletionScores:
    """Writes the score lists of one choice, as a whole or piece by piece, with offsets into its
    text."""

    def __init__(self, tokenizer: Tokenizer, num_top: int) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._decoder = tokenizer.stream_decoder()
        self._offset = 0

    def write(
        self, token_ids: Sequence[int], scores: Sequence[SampledToken | None]
    ) -> dict[str, list[Any]]:
        """Return the lists for the next tokens. A score is None if the token was not predicted (the
        first of a prompt)."""
        written: dict[str, list[Any]] = {
            name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        for number, (token_id, score) in enumerate(zip(token_ids, scores, strict=False)):
            if number % PIECE == PIECE - 1:
                give_way()
            written["tokens"].append(token_text(self._tokenizer, token_id))
            written["token_logprobs"].append(None if score is None else finite(score.logprob))
            written["top_logprobs"].append(None if score is None else self._top(score))
            written["text_offset"].append(self._offset)
            self._offset += len(self._decoder.push(token_id))
        return written

    def _top(self, score: SampledToken) -> dict[str, float | None]:
        return {
            token_text(self._tokenizer, token_id): finite(logprob)
            for token_id, logprob in score.top_logprobs[: self._num_top]
        }


def for_chat(
    tokenizer: Tokenizer, scores: Iterable[SampledToken], num_top: int
) -> dict[str, list[dict[str, Any]]]:
    """Return one object per token, with its ``num_top`` best alternatives."""

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": token_text(tokenizer, token_id),
            "logprob": finite(logprob),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    content = []
    for number, score in enumerate(scores):
        if number % PIECE == PIECE - 1:
            give_way()
        rivals = [entry(*pair) for pair in score.top_logprobs[:num_top]]
        content.append({**entry(score.token_id, score.logprob), "top_logprobs": rivals})
    return {"content": content}
