"""How long until it is used again: reuse hazards by class and age, learnt online, and the worth
rate they give.

A *class* is a short tuple of facts about an item; its *age* is the number of requests since it came
to its present stage (was made, used, superseded). For every class the hazard of a use is kept per
age bin, two bins an octave. Items that were evicted stay at risk: their ghosts report the use that
would have been, so the estimate does not depend on what the policy kept. Stages that have not ended
count with the age they have reached (censored).

The *index* of a class at an age is the best rate of uses per unit of time that keeping can give,
``max over T of P(used within T) / E[time kept until then]``: Gittins' index for a job that is worth
its use and costs its residence. Where hazard falls with age it is the hazard now, and ranks as LRU;
where uses come at a known distance (a loop) the old are worth more than the young, and a fixed part
of the loop is kept.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Hashable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def _bin_edges() -> Ints:
    edges = {0, 1, 2, 3}
    edges.update(round(2 ** (half / 2)) for half in range(4, 45))
    return np.array(sorted(edges), dtype=np.int64)


EDGES = _bin_edges()
"""Left edges of the age bins, requests; the last bin is open."""
NUM_BINS = len(EDGES)
_EDGE_LIST: list[int] = EDGES.tolist()
WIDTHS: Floats = np.diff(EDGES, append=2 * EDGES[-1]).astype(np.float64)
_PRIOR_AGES: Floats = EDGES + WIDTHS / 2 + 16.0
_SMALL = 1 << 16
_BIN_OF = (np.searchsorted(EDGES, np.arange(_SMALL), side="right") - 1).astype(np.intp)
AHEAD = 6
"""Bins past the oldest age that an index looks ahead, half an octave each. Further on nothing was
seen, and the hazard that is believed falls."""
DOUBT = 2.0
"""Standard deviations by which a class's uses must differ from what its parent's hazard foretells
before its level departs from it, and then only by what is left."""
SHAPE_WEIGHT = 16.0
"""Uses that an age bin needs before it is as much its own as what the class's level and the
parent's shape give."""
TOP_WEIGHT = 4.0
"""The same of a class without a parent. One use in a bin is chance: believed, it would order the
first evictions of a cache worse than recency does."""
MEMORY = 4096.0
"""Uses after which a class has forgotten half."""
_ROW_BITS = 24
_ROW_MASK = (1 << _ROW_BITS) - 1
"""A stage as one number: when it was entered, or its age, above; so many bits of its row below."""


def age_bins(ages: Ints, oldest: int) -> npt.NDArray[np.intp]:
    """Bin of every age, none above ``oldest``; below 0 counts as 0. O(n)."""
    if oldest >= _SMALL:
        return np.searchsorted(EDGES, np.maximum(ages, 0), side="right") - 1
    return _BIN_OF.take(ages, mode="clip")


class _Generation(NamedTuple):
    """The rows whose keys are equally long."""

    rows: Ints
    """Those of one parent stand together."""
    parents: Ints
    """Of each; none where the keys are of length one."""
    heirs: Ints
    """The parents, each once."""
    first: Ints
    """Where the rows of each begin."""


class Hazards:
    """Hazards and indices of all classes.

    ``open`` and ``close`` are O(1); ``refresh``, called now and then, O(open stages + classes *
    bins**2).
    """

    def __init__(self, max_open: int = 8192) -> None:
        self.now = 0
        """Logical time of the newest use seen, for those that share this: kept by them."""
        self._max_open = max_open
        self._rows: dict[tuple[Hashable, ...], int] = {}
        self._parents: list[int | None] = []
        self._priors: list[float] = []
        self._generations: list[_Generation] | None = None
        """All rows, those without a parent first; None: a row came since they were sorted."""
        self._events: Floats = np.zeros((64, NUM_BINS))
        self._reached: Floats = np.zeros((64, NUM_BINS))
        """Stages that ended in each bin, and below the time they spent in it."""
        self._partial: Floats = np.zeros((64, NUM_BINS))
        self.index: Floats = np.zeros((64, NUM_BINS))
        """Uses per request that keeping gives, by row and age bin; up to the bins that an age can
        reach before the next ``refresh``."""
        self._open = array("q", [-1]) * max_open
        """When each open stage was entered and its row in one number; -1: unused."""
        self._unused = list(range(max_open))
        self._places: dict[int, int] = {}
        """Where in ``_open`` a stage lies; the oldest first."""
        self._oldest = 0
        """No stage before it is open. The first key of a dictionary is not found in O(1) once many
        before it were taken out."""
        self._num_opened = 0
        self._changes = 0
        self._refreshed_at = 0
        self._ended: list[int] = []
        """Stages that ended since they were last counted: ages and rows, as those that are open."""
        self._used: list[int] = []
        """Those of them that ended in a use."""

    def row(self, key: tuple[Hashable, ...], prior: float = 1.0) -> int:
        """The row of class ``key``; ``key[:-1]`` is its parent. ``prior`` scales what is believed
        of a class without any evidence, at the top of its line: one use in ``(age + 16) / prior``
        requests. O(len(key)) the first time."""
        found = self._rows.get(key)
        if found is not None:
            return found
        parent = self.row(key[:-1], prior) if len(key) > 1 else None
        row = self._rows[key] = len(self._parents)
        self._parents.append(parent)
        self._priors.append(prior)
        self._generations = None
        if row == len(self.index):
            self._events, self._reached = _doubled(self._events), _doubled(self._reached)
            self._partial, self.index = _doubled(self._partial), _doubled(self.index)
        self.index[row] = prior / _PRIOR_AGES if parent is None else self.index[parent]
        return row

    def open(self, row: int, now: int) -> int:
        """An item enters a class; returns the number of the stage that begins."""
        stage = self._num_opened
        self._num_opened = stage + 1
        if not self._unused:
            while self._oldest not in self._places:
                self._oldest += 1
            self.close(self._oldest, now, used=False)
        place = self._places[stage] = self._unused.pop()
        self._open[place] = now << _ROW_BITS | row
        return stage

    def close(self, stage: int, now: int, used: bool) -> None:
        """The stage ends: by a use (real, or reported by a ghost), or otherwise. Closing it again
        changes nothing."""
        place = self._places.pop(stage, None)
        if place is None:
            return
        code = self._open[place]
        self._open[place] = -1
        self._unused.append(place)
        ended = (now - (code >> _ROW_BITS)) << _ROW_BITS | code & _ROW_MASK
        self._ended.append(ended)
        if used:
            self._used.append(ended)
            self._changes += 1

    def index_at(self, row: int, age: int) -> float:
        """The index of the class of ``row`` at ``age``, as of the latest ``refresh``. O(1)."""
        return float(self.index[row, max(bisect_right(_EDGE_LIST, age) - 1, 0)])

    def num_uses(self, row: int) -> float:
        """Uses counted in the class of ``row`` itself; those long past count for less."""
        self._count_ended()
        return float(self._events[row].sum())

    def refresh(self, now: int) -> bool:
        """Recompute the indices if enough has happened since the last time; says whether it did."""
        waited = now - self._refreshed_at
        if waited < 8 or (not self._changes and waited < 64):
            return False
        if waited < max(min(now // 6, 128), len(self._places) // 32):
            return False
        self._refreshed_at = now
        self._changes = 0
        latest = now + max(128, self._max_open // 32)
        num_bins = bisect_right(_EDGE_LIST, latest)
        hazard = self._hazards(now, min(num_bins + AHEAD, NUM_BINS))
        self.index[: len(hazard), :num_bins] = index_of(hazard, num_bins)
        self._forget()
        return True

    def _hazards(self, now: int, num_bins: int = NUM_BINS) -> Floats:
        """Uses per unit of time at risk, by row and bin, the first ``num_bins`` of them: what a
        class has not seen itself it has from its parent. No stage is older than these bins."""
        if self._generations is None:
            self._generations = _sorted_by_parent(self._parents)
        self._count_ended()
        exposure = self._at_risk(now, num_bins)
        events = self._events[: len(exposure), :num_bins].copy()
        for rows, _, heirs, first in reversed(self._generations[1:]):
            exposure[heirs] += np.add.reduceat(exposure[rows], first)
            events[heirs] += np.add.reduceat(events[rows], first)
        hazard = np.empty_like(exposure)
        for depth, (rows, parents, _, _) in enumerate(self._generations):
            if depth == 0:
                priors = np.array(self._priors)[rows]
                prior_ages = _PRIOR_AGES[:num_bins]
                shape, weight, doubt = priors[:, None] / prior_ages, TOP_WEIGHT, 0.0
            else:
                shape, weight, doubt = hazard[parents], SHAPE_WEIGHT, DOUBT
            exposed, used = exposure[rows], events[rows]
            foretold = np.matmul(exposed[:, None, :], shape[:, :, None])[:, 0]
            inherited = _level(used.sum(axis=1, keepdims=True), foretold, doubt) * shape
            hazard[rows] = (used + weight) / (exposed + weight / inherited)
        return hazard

    def _at_risk(self, now: int, num_bins: int) -> Floats:
        """Time spent in each of the first bins by all stages, ended or not, by row."""
        codes = np.frombuffer(self._open, np.int64)
        codes = codes[codes >= 0]
        reached, partial = self._by_age(now - (codes >> _ROW_BITS), codes & _ROW_MASK, now)
        reached, partial = reached[:, :num_bins], partial[:, :num_bins]
        reached += self._reached[: len(reached), :num_bins]
        partial += self._partial[: len(partial), :num_bins]
        beyond = np.cumsum(reached[:, ::-1], axis=1)[:, ::-1] - reached
        return np.asarray(beyond * WIDTHS[:num_bins] + partial)

    def _by_age(self, ages: Ints, rows: Ints, oldest: int) -> tuple[Floats, Floats]:
        """Stages by row and age bin, and the time that they spent in it; none is older than
        ``oldest``."""
        shape = len(self._parents), NUM_BINS
        bins = age_bins(ages, oldest)
        cells = rows * NUM_BINS + bins
        spent = ages - EDGES[bins] + 0.5
        reached = np.bincount(cells, minlength=shape[0] * shape[1])
        partial = np.bincount(cells, spent, shape[0] * shape[1])
        return reached.reshape(shape).astype(np.float64), partial.reshape(shape).astype(np.float64)

    def _count_ended(self) -> None:
        """Add what ended to the tables."""
        codes = np.array(self._ended + self._used, np.int64)
        ages, rows, num_ended = codes >> _ROW_BITS, codes & _ROW_MASK, len(self._ended)
        oldest = int(ages.max(initial=0))
        reached, partial = self._by_age(ages[:num_ended], rows[:num_ended], oldest)
        events, _ = self._by_age(ages[num_ended:], rows[num_ended:], oldest)
        self._reached[: len(reached)] += reached
        self._partial[: len(reached)] += partial
        self._events[: len(reached)] += events
        self._ended.clear()
        self._used.clear()

    def check(self) -> None:
        """AssertionError unless every place holds one open stage or is unused, and no count is
        negative. O(places)."""
        taken = sorted(self._places.values())
        assert sorted(taken + self._unused) == list(range(self._max_open)), (
            "a place is lost, or held twice"
        )
        assert taken == [place for place, code in enumerate(self._open) if code >= 0], (
            "an unused place has a stage"
        )
        assert list(self._places) == sorted(self._places), "the oldest stage is not the first"
        for counts in (self._events, self._reached, self._partial):
            assert not counts[len(self._parents) :].any(), "something was counted in no class"

    def _forget(self) -> None:
        heavy = self._events.sum(axis=1) > MEMORY
        self._events[heavy] *= 0.5
        self._reached[heavy] *= 0.5
        self._partial[heavy] *= 0.5


def _sorted_by_parent(parents: list[int | None]) -> list[_Generation]:
    """All rows, the shortest keys first. O(rows log rows)."""
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent is None else depths[parent] + 1)
    found = []
    for depth in range(max(depths, default=-1) + 1):
        above = [-1 if parent is None else parent for parent in parents]
        rows = [row for row, its_depth in enumerate(depths) if its_depth == depth]
        rows.sort(key=above.__getitem__)
        its_parents = np.array([above[row] for row in rows], np.int64)
        heirs, first = np.unique(its_parents, return_index=True)
        found.append(_Generation(np.array(rows, np.int64), its_parents, heirs, first))
    return found


def _level(uses: Floats, foretold: Floats, doubt: float) -> Floats:
    """Uses per use foretold, where the difference exceeds doubt; one use is believed of either
    beforehand."""
    difference = uses - foretold
    spread = np.sqrt(np.maximum(np.maximum(uses, foretold), 1.0))
    clear = np.maximum(np.abs(difference) - doubt * spread, 0.0)
    believed = foretold + np.copysign(clear, difference)
    return np.asarray(np.maximum((believed + 1.0) / (foretold + 1.0), 1e-3))


def index_of(hazard: Floats, num_bins: int = NUM_BINS) -> Floats:
    """max over T of P(use within T) / E[time until then], for every row and the first ``num_bins``
    bins to start from. T is the end of one of the bins of ``hazard``."""
    num_ends = hazard.shape[1]
    num_bins = min(num_bins, num_ends)
    widths = WIDTHS[:num_ends, None]
    steps = np.minimum(hazard.T.copy() * widths, 8.0)
    survive = np.zeros((num_ends + 1, len(hazard)))
    np.cumsum(steps, axis=0, out=survive[1:])
    np.exp(-survive, out=survive)
    spent = np.zeros_like(survive)
    np.cumsum(survive[:-1] * -np.expm1(-steps) * widths / steps, axis=0, out=spent[1:])
    best = np.empty((num_bins, len(hazard)))
    used, time = np.empty_like(steps), np.empty_like(steps)
    # Where hardly any survive, the time until then may not grow for rounding.
    stuck = np.any(spent[1:] <= spent[:-1], axis=1)
    for start in range(num_bins):
        np.subtract(survive[start], survive[start + 1 :], out=used[start:])
        np.subtract(spent[start + 1 :], spent[start], out=time[start:])
        if stuck[start]:
            time[time <= 0.0] = np.inf
        np.divide(used[start:], time[start:], out=used[start:])
        np.maximum.reduce(used[start:], axis=0, out=best[start])
    return np.where(survive[:num_bins] < 1e-280, hazard.T[:num_bins], best).T


def _doubled(table: Floats) -> Floats:
    return np.concatenate((table, np.zeros_like(table)))
