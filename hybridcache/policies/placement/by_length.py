"""Placements that only look at lengths: where to stand if nothing is known of where prompts will
part."""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt

from hybridcache.policies.protocol import Placed, PlacementPolicy, Prefill


class Aligned(PlacementPolicy):
    """The last multiple of ``step`` before the prompt's last token (LightLLM's rule with 512,
    vLLM's with its block)."""

    def __init__(self, step: int) -> None:
        self.step = _positive("aligned", step)

    def plan(self, prefill: Prefill) -> Iterator[Placed]:
        yield Placed((prefill.prompt_len - 1) // self.step * self.step, "aligned")


class Chunks(PlacementPolicy):
    """Where prefill chunks of ``size`` tokens end, counted from where the prompt resumes (SGLang's
    chunked prefill)."""

    def __init__(self, size: int) -> None:
        self.size = _positive("chunks", size)

    def plan(self, prefill: Prefill) -> Iterator[Placed]:
        for position in range(prefill.cached_len + self.size, prefill.prompt_len, self.size):
            yield Placed(position, "chunk")
        yield Placed(prefill.prompt_len, "chunk")


class Balanced(PlacementPolicy):
    """``count`` positions that cut the prompt into ``count`` + 1 equal parts: optimal, and minimax,
    for overlaps that are equally likely at every depth (2605.05219)."""

    def __init__(self, count: int) -> None:
        self.count = _positive("balanced", count)

    def plan(self, prefill: Prefill) -> Iterator[Placed]:
        for part in range(self.count, 0, -1):
            yield Placed(part * prefill.prompt_len // (self.count + 1), "balanced")


class Sqrt(PlacementPolicy):
    """Every sqrt(n) tokens of a prompt of n: as many checkpoints as tokens between two
    (2605.05219)."""

    def plan(self, prefill: Prefill) -> Iterator[Placed]:
        step = max(isqrt(prefill.prompt_len), prefill.grid)
        for position in range(prefill.prompt_len // step * step, 0, -step):
            yield Placed(position, "sqrt")


class Dyadic(PlacementPolicy):
    """1, 2, 4, 8 … grid steps from the beginning: wherever a later prompt leaves this one, it
    resumes at half of what they share or deeper (2605.05219)."""

    def plan(self, prefill: Prefill) -> Iterator[Placed]:
        steps = prefill.prompt_len // prefill.grid
        for power in range(steps.bit_length() - 1, -1, -1):
            yield Placed(prefill.grid << power, "dyadic")


class Thinned(PlacementPolicy):
    """``count`` positions past the cached part, each in the middle of the largest gap left (SGLang
    #38000 in placement)."""

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


def _positive(word: str, number: int) -> int:
    if number < 1:
        raise ValueError(f"{word}:N needs N of at least 1, got {number}")
    return number
