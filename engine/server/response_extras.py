"""Optional fields of answers: token ids, log-probabilities of the prompt, and SGLang's cache
details."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.server.logprobs import PIECE, finite, token_text
from engine.server.schemas import TokenOptions
from engine.server.workers import give_way
from engine.text.outputs import RequestOutput, SampledToken
from engine.text.tokenizer import Tokenizer


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
