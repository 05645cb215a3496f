"""Logits to tokens. A request's draw depends on its logits, its seed and how many tokens it has, on nothing else.

A draw is one number in [0, 1), made from (seed, number of the draw), looked up in the distribution's running sum: so it
needs no generator to be kept, and a request that is moved, preempted or batched differently draws the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.requests.sampling_params import SamplingInput, SamplingParams
from engine.text.outputs import SampledToken
from kernels.upload import upload

MASK = 2**64 - 1
SCORED_ROWS = 1024
"""At most, at once."""


class Drawn:
    """Tokens, and what is reported with them, on their way to the host."""

    def __init__(
        self,
        tokens: torch.Tensor,
        wanted: Sequence[int | None],
        scores: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """``wanted``: alternatives to report for each row; None: not even its own log-probability. ``scores`` of the rows that
        want any: own ``[rows]``, the most likely ones' ``[rows, n]`` and their ids ``[rows, n]``."""
        self.tokens = tokens
        """int64 ``[rows]``, on the device."""
        self._wanted = wanted
        self._copies = [_to_host(tensor) for tensor in (tokens, *(scores or ()))]
        self._event = None
        if tokens.device.type != "cpu":
            self._event = torch.get_device_module(tokens.device).Event()
            self._event.record()

    def wait(self) -> list[SampledToken]:
        """One token per row, as soon as the device has got so far."""
        if self._event is not None:
            self._event.synchronize()
        tokens, *scores = (copy.tolist() for copy in self._copies)
        if not scores:
            return [SampledToken(token, None) for token in tokens]
        scored = zip(*scores, strict=True)
        sampled = []
        for token, num_top in zip(tokens, self._wanted, strict=True):
            if num_top is None:
                sampled.append(SampledToken(token, None))
            else:
                own, top, ids = next(scored)
                best = tuple(zip(ids[:num_top], top[:num_top], strict=True))
                sampled.append(SampledToken(token, own, best))
        return sampled


class Sampler:
    """Chooses the next token for each row of logits. Stateless."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def sample(self, logits: torch.Tensor, requests: Sequence[SamplingInput]) -> list[SampledToken]:
        """One token per row of ``logits [rows, vocab]``, waited for."""
        return self.launch(logits, requests, range(len(requests))).wait()

    @torch.inference_mode()
    def launch(
        self, logits: torch.Tensor, requests: Sequence[SamplingInput], rows: Sequence[int]
    ) -> Drawn:
        """Begin to draw a token for each request, from its row of ``logits [N, vocab]``; ``rows`` ascend. Waits for nothing
        the device does."""
        logits = _pick(logits, rows)
        tokens = self._choose(logits, requests)
        wanted = [request.params.logprobs for request in requests]
        told = [row for row, num_top in enumerate(wanted) if num_top is not None]
        if not told:
            return Drawn(tokens, wanted)
        most = max(num_top or 0 for num_top in wanted)
        scores = _score(_pick(logits, told), _pick(tokens, told), most)
        return Drawn(tokens, wanted, scores)

    @torch.inference_mode()
    def score(self, logits: torch.Tensor, token_ids: Sequence[int], num_top: int) -> Drawn:
        """Log-probabilities of given tokens, one per row, with the ``num_top`` most likely ones beside each."""
        index = upload(token_ids, torch.int64, logits.device)
        return Drawn(index, [num_top] * len(token_ids), _score(logits, index, num_top))

    def _choose(self, logits: torch.Tensor, requests: Sequence[SamplingInput]) -> torch.Tensor:
        if all(_is_greedy(request.params) for request in requests):
            return logits.argmax(dim=-1)
        tokens = torch.empty(len(requests), dtype=torch.int64, device=logits.device)
        # What is sorted and what is not draws from differently ordered sums: batch mates must not decide which.
        for rows, draw in (
            ([r for r, q in enumerate(requests) if q.params.temperature == 0], None),
            ([r for r, q in enumerate(requests) if _is_plain(q.params)], _draw),
            ([r for r, q in enumerate(requests) if _is_filtered(q.params)], _draw_filtered),
        ):
            if rows:
                chosen = [requests[row] for row in rows]
                scores = _penalised(_pick(logits, rows), chosen)
                found = scores.argmax(dim=-1) if draw is None else draw(scores, chosen)
                tokens[_index(rows, logits.device)] = found
        return tokens


def uniform(seed: int, draw: int) -> float:
    """The ``draw``-th number in [0, 1) of a seed's sequence (splitmix64, Steele et al. 2014)."""
    z = (seed * 0xD1342543DE82EF95 + (draw + 1) * 0x9E3779B97F4A7C15) & MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * factor) & MASK
    return ((z ^ (z >> 31)) >> 11) / 2**53


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature == 0 and not params.needs_history


def _is_filtered(params: SamplingParams) -> bool:
    return params.temperature != 0 and (params.top_k is not None or params.top_p < 1)


def _is_plain(params: SamplingParams) -> bool:
    return params.temperature != 0 and not _is_filtered(params)


def _penalised(logits: torch.Tensor, requests: Sequence[SamplingInput]) -> torch.Tensor:
    """float32 logits after the penalties of each row."""
    scores = logits.float()
    if scores is logits:
        scores = logits.clone()
    for row, request in zip(scores, requests, strict=True):
        params = request.params
        if params.repetition_penalty != 1:
            seen = np.unique(np.concatenate([request.prompt, request.output]))
            index = upload(seen, torch.int64, row.device)
            found = row[index]
            row[index] = torch.where(
                found > 0, found / params.repetition_penalty, found * params.repetition_penalty
            )
        if (params.presence_penalty or params.frequency_penalty) and len(request.output):
            ids, counts = np.unique(np.asarray(request.output), return_counts=True)
            penalty = params.presence_penalty + params.frequency_penalty * counts
            index = upload(ids, torch.int64, row.device)
            row[index] -= upload(penalty, torch.float32, row.device)
    return scores


def _draw(scores: torch.Tensor, requests: Sequence[SamplingInput]) -> torch.Tensor:
    """From all tokens, or those that ``min_p`` leaves, in the order of their ids."""
    probabilities = _tempered(scores, requests).softmax(dim=-1)
    least = _column([request.params.min_p for request in requests], scores)
    floor = probabilities.amax(dim=-1, keepdim=True) * least
    return _look_up(probabilities.masked_fill_(probabilities < floor, 0.0), requests)


def _draw_filtered(scores: torch.Tensor, requests: Sequence[SamplingInput]) -> torch.Tensor:
    """From the tokens that top_k, top_p and min_p leave, in falling order of probability."""
    tempered, ids = _tempered(scores, requests).sort(dim=-1, descending=True, stable=True)
    probabilities = tempered.softmax(dim=-1)
    params = [request.params for request in requests]
    width = scores.shape[-1]
    ranks = torch.arange(width, device=scores.device)
    most = _column([float(p.top_k or width) for p in params], scores)
    before = probabilities.cumsum(dim=-1, dtype=torch.float64) - probabilities
    out = (ranks >= most) | (before >= _column([p.top_p for p in params], before))
    out |= probabilities < probabilities[:, :1] * _column([p.min_p for p in params], scores)
    out[:, 0] = False
    chosen = _look_up(probabilities.masked_fill_(out, 0.0), requests)
    return ids.gather(1, chosen[:, None])[:, 0]


def _look_up(probabilities: torch.Tensor, requests: Sequence[SamplingInput]) -> torch.Tensor:
    """The column at which each row's running sum passes its number: int64[rows]."""
    sums = probabilities.cumsum(dim=-1, dtype=torch.float64)
    points = _column([uniform(q.seed, q.draw) for q in requests], sums) * sums[:, -1:]
    return torch.searchsorted(sums, points, right=True)[:, 0].clamp_(max=sums.shape[-1] - 1)


def _tempered(scores: torch.Tensor, requests: Sequence[SamplingInput]) -> torch.Tensor:
    return scores / _column([request.params.temperature for request in requests], scores)


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return upload(values, like.dtype, like.device)[:, None]


def _index(rows: Sequence[int], device: torch.device) -> torch.Tensor:
    return upload(rows, torch.int64, device)


def _pick(tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """The given rows, which ascend."""
    return tensor if len(rows) == len(tensor) else tensor[_index(rows, tensor.device)]


def _score(
    logits: torch.Tensor, tokens: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of ``tokens [rows]``, of the ``num_top`` most likely ones ``[rows, n]``, and the latter's ids; so many
    rows at once that their float32 scores need no memory to speak of beside a step's."""
    if len(logits) > SCORED_ROWS:
        pairs = zip(logits.split(SCORED_ROWS), tokens.split(SCORED_ROWS), strict=True)
        parts = zip(*(_score(*pair, num_top) for pair in pairs), strict=True)
        own, top, ids = map(torch.cat, parts)
        return own, top, ids
    logprobs = logits.float().log_softmax(dim=-1)
    own = logprobs.gather(1, tokens[:, None])[:, 0]
    top, ids = logprobs.topk(min(num_top, logits.shape[-1]), dim=-1)
    return own, top, ids


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy for the host, on its way: read it after an event recorded from here on."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
