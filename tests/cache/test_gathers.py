"""Which of the rows gathered lately are kept."""

from __future__ import annotations

from typing import Any

import numpy as np

from hybridcache.radix.rows import GatherCache

ROWS = np.arange(10_000, dtype=np.int32)
TWO = 25_000
"""Rows that two answers fit in, with their heads, and a third does not."""


def segment() -> Any:
    """Stands for one: only its identity matters here."""
    return object()


def kept(gathers: GatherCache, *known: Any) -> list[bool]:
    return [gathers.get(one) is not None for one in known]


def test_the_oldest_answers_go_until_the_rest_fits() -> None:
    gathers, known = GatherCache(), []
    for _ in range(6):
        known.append(segment())
        gathers.keep(known[-1], ROWS, None, TWO)
        assert kept(gathers, *known) == [False] * (len(known) - 2) + [True] * min(2, len(known))


def test_the_newest_answer_stays_however_long_it_is() -> None:
    gathers, known = GatherCache(), [segment() for _ in range(2)]
    for one in known:
        gathers.keep(one, ROWS, None, 100)
    assert kept(gathers, *known) == [False, True]


def test_an_answer_that_was_extended_goes_before_an_older_one() -> None:
    gathers = GatherCache()
    older, begun, goes_on = known = [segment() for _ in range(3)]
    gathers.keep(older, ROWS, None, TWO)
    gathers.keep(begun, ROWS, None, TWO)
    gathers.keep(goes_on, ROWS, begun, TWO)
    assert kept(gathers, *known) == [True, False, True]
