"""Logits to tokens. A request's draw depends on its logits, its seed and how many tokens it has, on
nothing else.

A draw is one number in [0, 1), made from (seed, number of the draw), looked up in the
distribution's running sum: so it needs no generator to be kept, and a request that is moved,
preempted or batched differently draws the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.requests.sampling_params import SamplingInput, SamplingParams
from engine.text.outputs import NO_TOKEN, SampledToken
from kernels.upload import upload

MASK = 2**64 - 1
TOP_WIDTHS = (64, 1024)
"""Columns kept for a top_k: the first that it fits in. Few, so that few groups are drawn from."""


class Drawn:
    """Tokens, and what is reported with them, on their way to the host."""

    def __init__(
        self,
        tokens: torch.Tensor,
        sound: torch.Tensor,
        wanted: Sequence[int | None],
        scores: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """``sound``: bool ``[rows]``, whether a row's logits are numbers. ``wanted``: alternatives
        to report for each row; None: not even its own log-probability. ``scores`` of the rows that
        want any: own ``[rows]``, the most likely ones' ``[rows, n]`` and their ids."""
        self.tokens = tokens
        """int64 ``[rows]``, on the device: ids of tokens, whatever the logits."""
        self._wanted = wanted
        known = tokens.where(sound, NO_TOKEN)
        self._copies = [_to_host(tensor) for tensor in (known, *(scores or ()))]
        self._event = None
        if tokens.device.type != "cpu":
            self._event = torch.get_device_module(tokens.device).Event()
            self._event.record()

    def wait(self) -> list[SampledToken]:
        """One token per row, as soon as the device has got so far; ``NO_TOKEN`` where there are no
        logits to draw from."""
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
        """Begin to draw a token for each request, from its row of ``logits [N, vocab]``; ``rows``
        ascend. Waits for nothing the device does."""
        logits = _pick(logits, rows)
        tokens, sound = self._choose(logits, requests), _are_numbers(logits)
        wanted = [request.params.logprobs for request in requests]
        told = [row for row, num_top in enumerate(wanted) if num_top is not None]
        if not told:
            return Drawn(tokens, sound, wanted)
        most = max(num_top or 0 for num_top in wanted)
        scores = _score(_pick(logits, told), _pick(tokens, told), most)
        return Drawn(tokens, sound, wanted, scores)

    @torch.inference_mode()
    def keep(self, logits: torch.Tensor, row: int) -> torch.Tensor:
        """See ``TokenSampler.keep``."""
        return logits[row : row + 1].clone()

    @torch.inference_mode()
    def score(self, logits: torch.Tensor, token_ids: Sequence[int], num_top: int) -> Drawn:
        """Log-probabilities of given tokens, one per row, with the ``num_top`` most likely ones
        beside each."""
        index = upload(token_ids, torch.int64, logits.device)
        wanted = [num_top] * len(token_ids)
        return Drawn(index, _are_numbers(logits), wanted, _score(logits, index, num_top))

    def _choose(self, logits: torch.Tensor, requests: Sequence[SamplingInput]) -> torch.Tensor:
        scores = _masked(_penalised(_added(logits, requests), requests), requests)
        if all(request.params.is_greedy for request in requests):
            return scores.argmax(dim=-1)
        tokens = torch.empty(len(requests), dtype=torch.int64, device=logits.device)
        # Sums over other columns, or in another order, differ in their last bits: a request's own
        # parameters decide which it is drawn from, never its batch mates'.
        groups: dict[int | None, list[int]] = {}
        for row, request in enumerate(requests):
            groups.setdefault(_width(request.params, logits.shape[-1]), []).append(row)
        for width, rows in groups.items():
            chosen, picked = [requests[row] for row in rows], _pick(scores, rows).float()
            if width == 0:
                found = picked.argmax(dim=-1)
            elif width is None:
                found = _draw(picked, chosen)
            else:
                found = _draw_filtered(picked, chosen, width)
            tokens[_index(rows, logits.device)] = found
        return tokens


def _are_numbers(logits: torch.Tensor) -> torch.Tensor:
    """Whether a token can be drawn from each row: bool ``[rows]``, False where a logit is NaN or
    infinity, or all are minus infinity. The largest of a row is NaN if one of them is."""
    return logits.amax(dim=-1).isfinite()


def uniform(seed: int, draw: int) -> float:
    """The ``draw``-th number in [0, 1) of a seed's sequence (splitmix64, Steele et al. 2014)."""
    z = (seed * 0xD1342543DE82EF95 + (draw + 1) * 0x9E3779B97F4A7C15) & MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * factor) & MASK
    return ((z ^ (z >> 31)) >> 11) / 2**53


def _width(params: SamplingParams, vocab_size: int) -> int | None:
    """How many of the most likely tokens a draw is made from; 0: no draw; None: all, unsorted."""
    if params.is_greedy:
        return 0
    if params.top_k is not None:
        return next(
            (width for width in TOP_WIDTHS if params.top_k <= width < vocab_size), vocab_size
        )
    return vocab_size if params.top_p < 1 else None


def _added(logits: torch.Tensor, requests: Sequence[SamplingInput]) -> torch.Tensor:
    """Logits with what each row's rules add to some: float32 where any do. O(1) uploads."""
    additions = [(row, q.added) for row, q in enumerate(requests) if q.added is not None]
    if not additions:
        return logits
    places = np.concatenate([ids + row * logits.shape[-1] for row, (ids, _) in additions])
    values = np.concatenate([values for _, (_, values) in additions])
    changed = logits.to(torch.float32, copy=True)
    changed.view(-1).index_add_(
        0,
        upload(places, torch.int64, logits.device),
        upload(values, torch.float32, logits.device),
    )
    return changed


def _masked(scores: torch.Tensor, requests: Sequence[SamplingInput]) -> torch.Tensor:
    """Scores of the tokens that each row's mask allows; minus infinity elsewhere. O(1) uploads."""
    rows = [row for row, q in enumerate(requests) if q.mask is not None]
    if not rows:
        return scores
    device, size = scores.device, scores.shape[-1]
    masks = np.stack([q.mask for q in requests if q.mask is not None])
    bits = upload(masks, torch.uint8, device)[:, :, None] >> torch.arange(
        8, dtype=torch.uint8, device=device
    )
    forbidden = (bits & 1 == 0).flatten(1)[:, :size]
    index = _index(rows, device)
    return scores.index_copy(0, index, scores[index].masked_fill(forbidden, -torch.inf))


def _penalised(logits: torch.Tensor, requests: Sequence[SamplingInput]) -> torch.Tensor:
    """Logits after the penalties of each row: float32 where any has some. O(1) uploads."""
    index, factors, taken = [], [], []
    for row, request in enumerate(requests):
        if request.counts is not None:
            params, numbers = request.params, request.counts.numbers
            index.append(request.counts.ids + row * logits.shape[-1])
            factors.append(np.full(len(numbers), params.repetition_penalty))
            taken.append(
                params.presence_penalty * (numbers > 0) + params.frequency_penalty * numbers
            )
    if not index:
        return logits
    scores = logits.to(torch.float32, copy=True)
    places = upload(np.concatenate(index), torch.int64, logits.device)
    numbers = np.stack([np.concatenate(factors), np.concatenate(taken)])
    factor, less = upload(numbers, torch.float32, logits.device)
    flat = scores.view(-1)
    found = flat[places]
    flat[places] = torch.where(found > 0, found / factor, found * factor) - less
    return scores


def _draw(scores: torch.Tensor, requests: Sequence[SamplingInput]) -> torch.Tensor:
    """From all tokens, or those that ``min_p`` leaves, in the order of their ids."""
    probabilities = _tempered(scores, requests).softmax(dim=-1)
    least = _column([request.params.min_p for request in requests], scores)
    floor = probabilities.amax(dim=-1, keepdim=True) * least
    return _look_up(probabilities.masked_fill_(probabilities < floor, 0.0), requests)


def _draw_filtered(
    scores: torch.Tensor, requests: Sequence[SamplingInput], width: int
) -> torch.Tensor:
    """From the tokens that ``_filter`` leaves, the most likely first."""
    ids, probabilities = _filter(scores, requests, width)
    return ids.gather(1, _look_up(probabilities, requests)[:, None])[:, 0]


def _filter(
    scores: torch.Tensor, requests: Sequence[SamplingInput], width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, probabilities) ``[rows, width]``, falling: 0 for what is out by top_k, then by top_p of
    what top_k left, then by min_p. ``width``: no row's top_k is greater."""
    ids = _most_likely(scores, width)
    tempered = _tempered(scores.gather(1, ids), requests)
    params = [request.params for request in requests]
    ranks = torch.arange(width, device=scores.device)
    beyond = ranks >= _column([float(p.top_k or width) for p in params], scores)
    probabilities = tempered.masked_fill_(beyond, -torch.inf).softmax(dim=-1)
    before = probabilities.cumsum(dim=-1, dtype=torch.float64) - probabilities
    # The sum before the last may be rounded up to 1: a top_p of 1 keeps it.
    out = before >= _column([p.top_p if p.top_p < 1 else 2.0 for p in params], before)
    out |= probabilities < probabilities[:, :1] * _column([p.min_p for p in params], scores)
    out[:, 0] = False
    return ids, probabilities.masked_fill_(out, 0.0)


def _most_likely(scores: torch.Tensor, width: int) -> torch.Tensor:
    """Ids of the ``width`` highest of each row, falling; among equals the lower id first: int64.

    topk alone takes equals as it finds them. So it is given numbers of which no two are equal: the
    float's bits, ordered as integers are, above the id counted from the end.
    """
    num_ids = scores.shape[-1]
    if width == num_ids:
        return scores.sort(dim=-1, descending=True, stable=True).indices
    bits = (scores + 0.0).view(torch.int32)  # The sum makes of -0.0 the 0.0 that it equals.
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    keys.mul_(2**32).add_(torch.arange(num_ids - 1, -1, -1, device=scores.device))
    return num_ids - 1 - keys.topk(width, dim=-1).values % 2**32


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
    """Log-probabilities of ``tokens [rows]``, of the ``num_top`` most likely ones ``[rows, n]``,
    and the latter's ids."""
    logprobs = logits.float().log_softmax(dim=-1)
    own = logprobs.gather(1, tokens[:, None])[:, 0]
    ids = _most_likely(logprobs, min(num_top, logits.shape[-1]))
    return own, logprobs.gather(1, ids), ids


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy for the host, on its way: read it after an event recorded from here on."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
