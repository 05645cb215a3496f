"""Optional fields of answers: token ids, log-probabilities of the prompt, and SGLang's cache
details."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from engine.server.schemas import TokenOptions
from engine.server.workers import give_way
from engine.text.outputs import RequestOutput, SampledToken
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


def chat_scores(
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


def token_ids(
    body: TokenOptions, output: RequestOutput, new: Sequence[int], is_first: bool
) -> dict[str, Any]:
    """Return the ids of the ``new`` tokens in vLLM's form, with those of the prompt in the first
    part."""
    if not body.return_token_ids:
        return {}
    prompt = {"prompt_token_ids": output.prompt_token_ids.tolist()} if is_first else {}
    return {**prompt, "token_ids": [int(token) for token in new]}


def prompt_scores(
    tokenizer: Tokenizer, body: TokenOptions, output: RequestOutput
) -> dict[str, Any]:
    """Return the log-probabilities of the prompt in vLLM's form.

    For each prompt token there is an object by id, with the requested alternatives; null for the
    first.
    """
    scores = output.prompt_logprobs
    if body.prompt_logprobs is None or scores is None:
        return {}
    written: list[dict[str, Any] | None] = []
    for number, score in enumerate(scores):
        if number % PIECE == PIECE - 1:
            give_way()
        written.append(None if score is None else _entry(tokenizer, score, body.prompt_logprobs))
    return {"prompt_logprobs": written}


def _entry(tokenizer: Tokenizer, score: SampledToken, num_top: int) -> dict[str, Any]:
    best = list(score.top_logprobs[:num_top])
    ranks = {token: rank for rank, (token, _) in enumerate(best, 1)}
    if score.token_id not in ranks:
        best.append((score.token_id, score.logprob or 0.0))
    return {
        str(token): {
            "logprob": finite(logprob),
            # The rank of a less likely token is not known.
            "rank": ranks.get(token),
            "decoded_token": token_text(tokenizer, token),
        }
        for token, logprob in best
    }


def cache_details(body: TokenOptions, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Return SGLang's ``sglext`` with the number of cached tokens of the first answer's prompt.

    All are counted as read on the device, because tokens from other tiers are copied there first.
    """
    if not body.return_cached_tokens_details:
        return {}
    return {"sglext": {"cached_tokens_details": {"device": outputs[0].cached_len}}}


def cache_headers(output: RequestOutput) -> dict[str, str]:
    """Return the cache headers of an answer: ``x-cache-hit-tokens``, ``x-cache-prompt-tokens``, and
    ``x-cache-lost`` with its causes."""
    headers = {
        "x-cache-prompt-tokens": str(len(output.prompt_token_ids)),
        "x-cache-hit-tokens": str(output.cached_len),
    }
    if output.losses is not None:
        lost = [f"{name}={number}" for name, number in output.losses._asdict().items() if number]
        headers["x-cache-lost"] = ", ".join(lost) or "none"
    return headers
