"""Placement rules based on lengths only, for prompts without known points of divergence."""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt

from hybridcache.policies.protocol import Placed, PlacementPolicy, Prefill


class Aligned(PlacementPolicy):
    """Save at the last multiple of ``step`` before the prompt's last token.

    This is LightLLM's rule with ``step`` 512, and vLLM's with its block size.
    """

    def __init__(self, step: int) -> None:
        self.step = _positive("aligned", step)

    def plan(self, prefill: Prefill) -> Iterator[Placed]:
        yield Placed((prefill.prompt_len - 1) // self.step * self.step, "aligned")


class Chunks(PlacementPolicy):
    """Save at the end of each prefill chunk of ``size`` tokens, counted from the resumed position.

    Source: SGLang's chunked prefill.
    """

    def __init__(self, size: int) -> None:
        self.size = _positive("chunks", size)

    def plan(self, prefill: Prefill) -> Iterator[Placed]:
        for position in range(prefill.cached_len + self.size, prefill.prompt_len, self.size):
            yield Placed(position, "chunk")
        yield Placed(prefill.prompt_len, "chunk")


class Balanced(PlacementPolicy):
    """Save at ``count`` positions that divide the prompt into ``count`` + 1 equal parts.

    Optimal and minimax for overlaps that are equally likely at every depth (arXiv:2605.05219).
    """

    def __init__(self, count: int) -> None:
        self.count = _positive("balanced", count)

    def plan(self, prefill: Prefill) -> Iterator[Placed]:
        for part in range(self.count, 0, -1):
            yield Placed(part * prefill.prompt_len // (self.count + 1), "balanced")


class Sqrt(PlacementPolicy):
    """Save every sqrt(n) tokens of a prompt of n tokens: as many checkpoints as tokens between two.

    Source: arXiv:2605.05219.
    """

    def plan(self, prefill: Prefill) -> Iterator[Placed]:
        step = max(isqrt(prefill.prompt_len), prefill.grid)
        for position in range(prefill.prompt_len // step * step, 0, -step):
            yield Placed(position, "sqrt")


class Dyadic(PlacementPolicy):
    """Save after 1, 2, 4, 8, ... grid steps.

    A later prompt resumes at half of the shared length or deeper (arXiv:2605.05219).
    """

    def plan(self, prefill: Prefill) -> Iterator[Placed]:
        steps = prefill.prompt_len // prefill.grid
        for power in range(steps.bit_length() - 1, -1, -1):
            yield Placed(prefill.grid << power, "dyadic")


class Thinned(PlacementPolicy):
    """Save at ``count`` positions after the cached part, each in the middle of the largest gap.

    Source: SGLang #38000, applied to placement.
    """

    def __init__(self, count: int) -> None:
        self.count = _positive("thinned", count)

    def plan(self, prefill: Prefill) -> Iterator[Placed]:
        cuts = [prefill.cached_len, prefill.prompt_len]
        yield Placed(prefill.prompt_len, "thinned")
        for _ in range(self.count - 1):
            gap = max(range(len(cuts) - 1), key=lambda place: cuts[place + 1] - cuts[place])
            middle = (cuts[gap] + cuts[gap + 1]) // 2
            cuts.insert(gap + 1, middle)
            yield Placed(middle, "thinned")


def _positive(name: str, number: int) -> int:
    if number < 1:
        raise ValueError(f"{name}:N requires N >= 1 (got {number}).")
    return number
