"""Placement by dynamic programming over the observed overlap depths of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hybridcache.policies.protocol import Placed, PlacementPolicy, Prefill

DECAY = 0.99
"""Decay of the histogram per prompt."""
REPLAN_EVERY = 10


def plan(depths: Sequence[int], weights: Sequence[float], count: int) -> tuple[int, ...]:
    """Choose up to ``count`` of ``depths`` (ascending) to minimise the expected recomputation.

    A prompt that overlaps to depth d resumes at the deepest position at or before d and computes
    the rest of d again. Exact, by a monotone hull of lines. O(len(depths) * count).

    >>> plan([10, 20, 90], [1.0, 1.0, 5.0], 1), plan([10, 20, 90], [1.0, 1.0, 5.0], 2)
    ((90,), (20, 90))
    """
    size = len(depths)
    weight = [0.0]
    moment = [0.0]
    for depth, share in zip(depths, weights, strict=True):
        weight.append(weight[-1] + share)
        moment.append(moment[-1] + share * depth)
    cost = list(moment)
    choices: list[list[int]] = []
    for _ in range(min(count, size)):
        cost, choice = _one_more(depths, weight, moment, cost)
        choices.append(choice)
    end = size
    found: list[int] = []
    for choice in reversed(choices):
        start = choice[end]
        if start < 0:
            break
        found.append(depths[start])
        end = start
    return tuple(reversed(found))


def _one_more(
    depths: Sequence[int], weight: list[float], moment: list[float], cost: list[float]
) -> tuple[list[float], list[int]]:
    """Add one checkpoint. Returns the least cost of the first j depths for every j, and its choice.

    A checkpoint at depth i, the deepest below j, adds ``moment[j] - moment[i] - depths[i] *
    (weight[j] - weight[i])`` to the cost of the first i: a line in ``weight[j]`` of slope
    ``-depths[i]``.
    """
    hull: list[tuple[float, float, int]] = []
    first = 0
    best = [cost[0]]
    choice = [-1]
    for j in range(1, len(depths) + 1):
        i = j - 1
        line = (-float(depths[i]), cost[i] - moment[i] + depths[i] * weight[i], i)
        while len(hull) - first >= 2 and _needless(hull[-2], hull[-1], line):
            hull.pop()
        hull.append(line)
        at = weight[j]
        while len(hull) - first >= 2 and _value(hull[first + 1], at) <= _value(hull[first], at):
            first += 1
        with_one = moment[j] + _value(hull[first], at)
        if with_one < cost[j]:
            best.append(with_one)
            choice.append(hull[first][2])
        else:
            best.append(cost[j])
            choice.append(-1)
    return best, choice


def _value(line: tuple[float, float, int], at: float) -> float:
    return line[0] * at + line[1]


def _needless(
    before: tuple[float, float, int],
    middle: tuple[float, float, int],
    after: tuple[float, float, int],
) -> bool:
    """Return True if ``middle`` is not part of the lower hull of its neighbours. Slopes
    decrease."""
    return (after[1] - before[1]) * (before[0] - middle[0]) <= (middle[1] - before[1]) * (
        before[0] - after[0]
    )


class Planned(PlacementPolicy):
    """Save at the ``count`` positions of an exact plan over the overlaps seen so far.

    Source: Shirokikh, Nikolenko, "Sparse prefix caching" (arXiv:2605.05219). The histogram of
    overlap depths decays by 0.99 per prompt and is replanned every 10 prompts. It is shared by all
    prompts. Until the first overlap the rule saves at the prompt's end. O(depths * count) per
    replanning, with depths on the grid.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"planned:N requires N >= 1 (got {count}).")
        self.count = count
        self._histogram: dict[int, float] = {}
        self._since_plan = 0
        self._plan: tuple[int, ...] = ()
        self._gain = 1.0

    def plan(self, prefill: Prefill) -> Iterator[Placed]:
        deepest_first = [p for p in reversed(self._plan) if p <= prefill.prompt_len]
        for position in deepest_first or [prefill.prompt_len]:
            yield Placed(position, "planned")

    def on_prefill(self, prefill: Prefill) -> None:
        """Count the overlap of the prompt with earlier ones."""
        self._observe(min(prefill.seen_len, prefill.prompt_len - 1), prefill.grid)

    def _observe(self, overlap: int, grid: int) -> None:
        depth = overlap - overlap % grid
        self._gain /= DECAY
        if depth > 0:
            self._histogram[depth] = self._histogram.get(depth, 0.0) + self._gain
        self._since_plan += 1
        if self._since_plan >= REPLAN_EVERY or not self._plan:
            self._since_plan = 0
            self._forget()
            depths = sorted(self._histogram)
            weights = [self._histogram[depth] for depth in depths]
            self._plan = plan(depths, weights, self.count)

    def _forget(self) -> None:
        """Rescale the weights and drop those that have decayed."""
        scaled = {depth: weight / self._gain for depth, weight in self._histogram.items()}
        self._histogram = {depth: weight for depth, weight in scaled.items() if weight > 1e-3}
        self._gain = 1.0
