"""Sampler: draws tokens from logits.

A draw looks up one number in [0, 1), made from (seed, number of the draw), in the cumulative
distribution. So a request that is moved, preempted or batched differently draws the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from engine.requests.logit_rules import FREE
from engine.requests.request import SamplingInput, SamplingParams
from engine.runner.device import HostCopy
from engine.text.answers import NO_TOKEN, SampledToken
from kernels.upload import upload

MASK = 2**64 - 1
ONE = 2**52
"""Probability 1 as an integer. Sums of rounded integers are exact in any order, while a device
chooses its order of floating-point sums by the number of rows."""
TOP_WIDTHS = (64, 1024)
"""Numbers of columns kept for a top_k; the first that is large enough is used."""


class Drawn:
    """Tokens with their log-probabilities, possibly still being copied to the host."""

    def __init__(
        self, tokens: torch.Tensor, logits: torch.Tensor, wanted: Mapping[int, int]
    ) -> None:
        """``wanted``: number of alternatives to report, for each row with log-probabilities."""
        self.tokens = tokens
        """int64 ``[rows]``, on the device: valid token ids, even for invalid logits."""
        self._wanted = wanted
        # The largest logit of a row is NaN if one of them is.
        results = [tokens.where(logits.amax(dim=-1).isfinite(), NO_TOKEN)]
        if wanted:
            rows = list(wanted)
            results += _score(pick(logits, rows), pick(tokens, rows), max(wanted.values()))
        self._copies = HostCopy(*results)

    def wait(self) -> list[SampledToken]:
        """Wait for one token per row. It is ``NO_TOKEN`` for a row with a logit that is NaN or
        infinity, or with only minus infinity."""
        tokens, *scores = self._copies.wait()
        sampled = list(map(SampledToken, tokens.tolist()))
        if not scores:
            return sampled
        scored = zip(*(copy.tolist() for copy in scores), strict=True)
        for (row, num_top), (own, top, ids) in zip(self._wanted.items(), scored, strict=True):
            best = tuple(zip(ids[:num_top], top[:num_top], strict=True))
            sampled[row] = SampledToken(sampled[row].token_id, own, best)
        return sampled


MOST_NUMBERS = 2**22
"""Most scores that are sorted, summed or masked at a time, so that temporary memory hardly grows
with the number of rows. Each takes up to 45 bytes."""


class Sampler:
    """Draws the next token for each row of logits. Stateless."""

    @torch.inference_mode()
    def launch(
        self, logits: torch.Tensor, requests: Sequence[SamplingInput], rows: Sequence[int]
    ) -> Drawn:
        """Start drawing a token for each request, from its row of ``logits [N, vocab]``. ``rows``
        ascend."""
        logits, vocab_size = pick(logits, rows), logits.shape[-1]
        wanted = {
            row: num_top
            for row, request in enumerate(requests)
            if (num_top := request.params.logprobs) is not None
        }
        scores = _ruled(logits, requests)
        if all(request.params.is_greedy for request in requests):
            return Drawn(scores.argmax(dim=-1), logits, wanted)
        tokens = torch.empty(len(requests), dtype=torch.int64, device=logits.device)
        # Sums over other columns, or in another order, differ in their last bits. So the columns
        # depend on the parameters of the request only, never on the rest of the batch.
        groups: dict[int | None, list[int]] = {}
        for row, request in enumerate(requests):
            groups.setdefault(_width(request.params, vocab_size), []).append(row)
        for width, group in groups.items():
            for part in _parts(len(group), vocab_size):
                of_part = group[part]
                picked, chosen = pick(scores, of_part).float(), [requests[row] for row in of_part]
                if width == 0:
                    found = picked.argmax(dim=-1)
                elif width is None:
                    found = _draw(picked, chosen)
                else:
                    ids, probabilities = _filter(picked, chosen, width)
                    found = ids.gather(1, _look_up(probabilities, chosen)[:, None])[:, 0]
                tokens[upload(of_part, torch.int64, logits.device)] = found
        return Drawn(tokens, logits, wanted)

    @torch.inference_mode()
    def score(self, logits: torch.Tensor, token_ids: Sequence[int], num_top: int) -> Drawn:
        """Compute log-probabilities of given tokens, one per row, and of the most likely ones."""
        index = upload(token_ids, torch.int64, logits.device)
        return Drawn(index, logits, dict.fromkeys(range(len(token_ids)), num_top))


def uniform(seed: int, draw: int) -> float:
    """Return a number in [0, 1) of a seed's sequence (splitmix64, Steele et al. 2014)."""
    z = (seed * 0xD1342543DE82EF95 + (draw + 1) * 0x9E3779B97F4A7C15) & MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * factor) & MASK
    return ((z ^ (z >> 31)) >> 11) / 2**53


def _width(params: SamplingParams, vocab_size: int) -> int | None:
    """Return the number of most likely tokens to draw from. 0 for greedy, None to draw from all
    without sorting. ``_filter`` is not called for None, so each of its options is read here too."""
    if params.is_greedy:
        return 0
    if params.top_k is not None:
        return min([w for w in TOP_WIDTHS if w >= params.top_k] + [vocab_size])
    return vocab_size if params.top_p < 1 else None


def _ruled(logits: torch.Tensor, requests: Sequence[SamplingInput]) -> torch.Tensor:
    """Return ``logits`` changed by the rulings: float32 if any adds or penalises."""
    rulings = [(row, one.ruling) for row, one in enumerate(requests) if one.ruling is not FREE]
    added = {row: ruling.added for row, ruling in rulings if ruling.added is not None}
    repeats = {row: ruling.repeats for row, ruling in rulings if ruling.repeats is not None}
    masks = {row: ruling.mask for row, ruling in rulings if ruling.mask is not None}
    if not (added or repeats or masks):
        return logits
    device, size = logits.device, logits.shape[-1]
    logits = logits.to(torch.float32 if added or repeats else logits.dtype, copy=True)
    flat = logits.view(-1)
    if added:
        places = np.concatenate([ids + row * size for row, (ids, _) in added.items()])
        values = np.concatenate([values for _, values in added.values()])
        index = upload(places, torch.int64, device)
        flat.index_add_(0, index, upload(values, torch.float32, device))
    if repeats:
        places = np.concatenate([one.ids + row * size for row, one in repeats.items()])
        numbers = np.concatenate([one.numbers for one in repeats.values()], axis=1)
        index = upload(places, torch.int64, device)
        factor, less = upload(numbers, torch.float32, device)
        found = flat[index]
        flat[index] = torch.where(found > 0, found / factor, found * factor) - less
    masked = np.array([*masks])
    for part in _parts(len(masks), size):
        bits = upload(np.stack([*masks.values()][part]), torch.uint8, device)[:, :, None]
        bits = bits >> torch.arange(8, dtype=torch.uint8, device=device)
        forbidden = (bits & 1 == 0).flatten(1)[:, :size]
        index = upload(masked[part], torch.int64, device)
        logits[index] = logits[index].masked_fill(forbidden, -torch.inf)
    return logits


def _draw(scores: torch.Tensor, requests: Sequence[SamplingInput]) -> torch.Tensor:
    """Draw from all tokens, or those that pass ``min_p``, in the order of their ids."""
    columns = [q.params.temperature for q in requests], [q.params.min_p for q in requests]
    temperatures, least = upload(columns, scores.dtype, scores.device)[:, :, None]
    probabilities = (scores / temperatures).softmax(dim=-1)
    floor = probabilities.amax(dim=-1, keepdim=True) * least
    return _look_up(probabilities.masked_fill_(probabilities < floor, 0.0), requests)


def _filter(
    scores: torch.Tensor, requests: Sequence[SamplingInput], width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply top_k, then top_p, then min_p. Returns (ids, probabilities) ``[rows, width]``, most
    likely first, with probability 0 for excluded tokens."""
    ids = _most_likely(scores, width)
    params = [request.params for request in requests]
    tempered = scores.gather(1, ids) / _column([p.temperature for p in params], scores)
    ranks = torch.arange(width, device=scores.device)
    beyond = ranks >= _column([float(p.top_k or width) for p in params], scores)
    probabilities = tempered.masked_fill_(beyond, -torch.inf).softmax(dim=-1)
    parts = (probabilities * ONE).long()
    before = parts.cumsum(dim=-1) - parts
    # Rounded probabilities may add up to more than 1; a top_p of 1 must keep the last column.
    out = before >= _column([int(p.top_p * ONE) if p.top_p < 1 else 2 * ONE for p in params], parts)
    out |= probabilities < probabilities[:, :1] * _column([p.min_p for p in params], scores)
    out[:, 0] = False
    return ids, probabilities.masked_fill_(out, 0.0)


def _most_likely(scores: torch.Tensor, width: int) -> torch.Tensor:
    """Return the ids of the ``width`` highest scores of each row, highest first: int64. Of equal
    scores, the lower id comes first.

    ``topk`` orders equal scores arbitrarily. So it is applied to distinct integer keys: the float's
    bits, in integer order, above the id counted from the end.
    """
    num_ids = scores.shape[-1]
    if width == num_ids:
        return scores.sort(dim=-1, descending=True, stable=True).indices
    bits = (scores + 0.0).view(torch.int32)  # The sum turns -0.0 into 0.0, which is equal.
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    keys.mul_(2**32).add_(torch.arange(num_ids - 1, -1, -1, device=scores.device))
    return num_ids - 1 - keys.topk(width, dim=-1).values % 2**32


def _look_up(probabilities: torch.Tensor, requests: Sequence[SamplingInput]) -> torch.Tensor:
    """Return the column at which each row's cumulative sum passes its random number."""
    sums = (probabilities * ONE).long().cumsum(dim=-1)
    numbers = [uniform(q.seed, q.draw) for q in requests]
    total = sums[:, -1:]
    points = upload(numbers, torch.float64, sums.device)[:, None] * total.double()
    points = points.long().minimum(total - 1)
    return torch.searchsorted(sums, points, right=True)[:, 0].clamp_(max=sums.shape[-1] - 1)


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return upload(values, like.dtype, like.device)[:, None]


def pick(tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Select the given rows, which ascend."""
    return tensor if len(rows) == len(tensor) else tensor[upload(rows, torch.int64, tensor.device)]


def _score(
    logits: torch.Tensor, tokens: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-probabilities of ``tokens [rows]`` and of the most likely ``[rows, n]``, and the
    ids of these."""
    parts = []
    for part in _parts(*logits.shape):
        logprobs = logits[part].float().log_softmax(dim=-1)
        ids = _most_likely(logprobs, min(num_top, logits.shape[-1]))
        parts.append((logprobs.gather(1, tokens[part, None])[:, 0], logprobs.gather(1, ids), ids))
    own, top, ids = map(torch.cat, zip(*parts, strict=True))
    return own, top, ids


def _parts(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Yield slices of rows with at most ``MOST_NUMBERS`` numbers."""
    most = max(1, MOST_NUMBERS // num_columns)
    return (slice(first, first + most) for first in range(0, num_rows, most))
