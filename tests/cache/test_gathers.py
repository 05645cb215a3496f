"""Cache of recently gathered rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from hybridcache.radix.rows import GatherCache

ROWS = np.arange(10_000, dtype=np.int32)
LIMIT_OF_TWO = 25_000
"""Limit in rows that two results with their overhead fit in, and a third does not."""


class Part:
    """Segment of one node, below ``above`` if it is given."""

    def __init__(self, num_rows: int = 10_000, above: Part | None = None) -> None:
        self.indices = ROWS[:num_rows]
        self.kv, self.parent = self, None if above is None else above.node
        self.node: Any = self


def are_cached(gathers: GatherCache, *segments: Any) -> list[bool]:
    return [segment in gathers.rows for segment in segments]


def test_the_oldest_results_are_dropped_until_the_rest_fits() -> None:
    gathers, segments = GatherCache(), []
    for _ in range(6):
        segments.append(Part())
        gathers.join(segments[-1], LIMIT_OF_TWO)
        assert are_cached(gathers, *segments) == [False] * (len(segments) - 2) + [True] * min(
            2, len(segments)
        )


def test_the_newest_result_is_cached_whatever_its_length() -> None:
    gathers, segments = GatherCache(), [Part() for _ in range(2)]
    for each in segments:
        gathers.join(each, 100)
    assert are_cached(gathers, *segments) == [False, True]


def test_an_extended_result_is_dropped_before_an_older_one() -> None:
    gathers = GatherCache()
    older, start = Part(), Part(6_000)
    segments = older, start, Part(4_000, above=start)
    for each in segments:
        gathers.join(each, LIMIT_OF_TWO)
    assert are_cached(gathers, *segments) == [True, False, True]
