"""Cache of recently gathered rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from hybridcache.radix.rows import GatherCache

ROWS = np.arange(10_000, dtype=np.int32)
LIMIT_OF_TWO = 25_000
"""Limit in rows that two results with their overhead fit in, and a third does not."""


def segment() -> Any:
    """Return a placeholder of a KV segment. Only its identity matters."""
    return object()


def are_cached(gathers: GatherCache, *segments: Any) -> list[bool]:
    return [segment in gathers.rows for segment in segments]


def test_the_oldest_results_are_dropped_until_the_rest_fits() -> None:
    gathers, segments = GatherCache(), []
    for _ in range(6):
        segments.append(segment())
        gathers.keep(segments[-1], ROWS, None, LIMIT_OF_TWO)
        assert are_cached(gathers, *segments) == [False] * (len(segments) - 2) + [True] * min(
            2, len(segments)
        )


def test_the_newest_result_is_cached_whatever_its_length() -> None:
    gathers, segments = GatherCache(), [segment() for _ in range(2)]
    for each in segments:
        gathers.keep(each, ROWS, None, 100)
    assert are_cached(gathers, *segments) == [False, True]


def test_an_extended_result_is_dropped_before_an_older_one() -> None:
    gathers = GatherCache()
    older, start, extension = segments = [segment() for _ in range(3)]
    gathers.keep(older, ROWS, None, LIMIT_OF_TWO)
    gathers.keep(start, ROWS, None, LIMIT_OF_TWO)
    gathers.keep(extension, ROWS, start, LIMIT_OF_TWO)
    assert are_cached(gathers, *segments) == [True, False, True]
