"""Log probabilities in the two shapes OpenAI gives them: parallel lists for completions, a list of
objects for chats."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from engine.text.outputs import SampledToken
from engine.text.tokenizer import Tokenizer


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as text; ``bytes:\\xe2\\x80`` where it is no whole characters, so that different
    tokens look different."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode("utf-8") if raw else f"token:{token_id}"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class CompletionScores:
    """Writes the lists of one choice, whole or piece by piece; remembers where in the text it
    is."""

    def __init__(self, tokenizer: Tokenizer, num_top: int) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._decoder = tokenizer.stream_decoder()
        self._offset = 0

    def write(
        self, token_ids: Sequence[int], scores: Sequence[SampledToken | None]
    ) -> dict[str, list[Any]]:
        """The lists of the next tokens, one score each; None where nothing was predicted (the first
        of a prompt)."""
        offsets = []
        for token_id in token_ids:
            offsets.append(self._offset)
            self._offset += len(self._decoder.push((token_id,)))
        return {
            "tokens": [token_text(self._tokenizer, token_id) for token_id in token_ids],
            "token_logprobs": [None if score is None else score.logprob for score in scores],
            "top_logprobs": [None if score is None else self._top(score) for score in scores],
            "text_offset": offsets,
        }

    def _top(self, score: SampledToken) -> dict[str, float]:
        return {
            token_text(self._tokenizer, token_id): logprob
            for token_id, logprob in score.top_logprobs[: self._num_top]
        }


def for_chat(
    tokenizer: Tokenizer, scores: Iterable[SampledToken], num_top: int
) -> dict[str, list[dict[str, Any]]]:
    """One object a token, its ``num_top`` best rivals in it."""

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": token_text(tokenizer, token_id),
            "logprob": logprob,
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    return {
        "content": [
            {
                **entry(score.token_id, score.logprob),
                "top_logprobs": [entry(*pair) for pair in score.top_logprobs[:num_top]],
            }
            for score in scores
        ]
    }
