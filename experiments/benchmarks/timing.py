"""Timing of benchmarks: calls that alternate on one clock, and their ratio.

Noise of the machine affects all calls of a turn, so the ratio of two medians is steadier than
either.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

Key = TypeVar("Key")
Call = Callable[[], object]
Clock = Callable[[], float]


def alternate(
    calls: Mapping[Key, Call],
    turns: int,
    clock: Clock = time.perf_counter,
    prepare: Call = lambda: None,
) -> dict[Key, list[float]]:
    """Return the seconds of each call in each turn, after one turn that is not measured.

    ``prepare`` runs before each call and is not measured. A call that returns a float has measured
    its own seconds, in another process.
    """
    taken: dict[Key, list[float]] = {key: [] for key in calls}
    for turn in range(max(turns, 2) + 1):
        for key, call in calls.items():
            prepare()
            start = clock()
            measured = call()
            end = clock()
            if turn:
                taken[key].append(measured if isinstance(measured, float) else end - start)
    return taken


def medians(
    calls: Mapping[Key, Call], turns: int, clock: Clock, prepare: Call = lambda: None
) -> dict[Key, float]:
    """Return the median seconds of calls that alternate."""
    taken = alternate(calls, turns, clock, prepare)
    return {key: statistics.median(seconds) for key, seconds in taken.items()}


def ratio_spread(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the interquartile range of the ratios of single turns, ours being the divisor."""
    ratios = [two / one for one, two in zip(ours, theirs, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return high - low
