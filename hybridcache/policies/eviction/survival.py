"""How long until it is used again: reuse hazards by class and age, learnt online, and the worth rate they give.

A *class* is a short tuple of facts about an item; its *age* is the number of requests since it came to its present stage (was
made, used, superseded). For every class the hazard of a use is kept per age bin, two bins an octave. Items that were
evicted stay at risk: their ghosts report the use that would have been, so the estimate does not depend on what the policy
kept. Stages that have not ended count with the age they have reached (censored).

The *index* of a class at an age is the best rate of uses per unit of time that keeping can give,
``max over T of P(used within T) / E[time kept until then]``: Gittins' index for a job that is worth its use and costs its
residence. Where hazard falls with age it is the hazard now, and ranks as LRU; where uses come at a known distance (a loop)
the old are worth more than the young, and a fixed part of the loop is kept.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def _bin_edges() -> npt.NDArray[np.int64]:
    edges = {0, 1, 2, 3}
    edges.update(round(2 ** (half / 2)) for half in range(4, 45))
    return np.array(sorted(edges), dtype=np.int64)


EDGES = _bin_edges()
"""Left edges of the age bins, requests; the last bin is open."""
NUM_BINS = len(EDGES)
_EDGE_LIST: list[int] = EDGES.tolist()
WIDTHS: Floats = np.diff(EDGES, append=2 * EDGES[-1]).astype(np.float64)
_SMALL = 1 << 14
_BIN_OF: npt.NDArray[np.intp] = np.searchsorted(EDGES, np.arange(_SMALL), side="right") - 1
DOUBT = 2.0
"""Standard deviations by which a class's uses must differ from what its parent's hazard foretells before its level departs
from it, and then only by what is left."""
SHAPE_WEIGHT = 16.0
"""Uses that an age bin needs before it is as much its own as what the class's level and the parent's shape give."""
MEMORY = 4096.0
"""Uses after which a class has forgotten half."""


def age_bins(ages: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
    """Bin of every age. O(n)."""
    if len(ages) and ages.max() >= _SMALL:
        return np.searchsorted(EDGES, ages, side="right") - 1
    return _BIN_OF[ages]


class Stage:
    """One item's time in one class: from ``entered`` until it is used or changes class."""

    __slots__ = ("entered", "row")

    def __init__(self, row: int, entered: int) -> None:
        self.row = row
        self.entered = entered


class Survival:
    """Hazards and indices of all classes.

    ``open`` and ``close`` are O(1); ``refresh``, called now and then, O(open stages + classes * bins**2).
    """

    def __init__(self, max_open: int = 8192) -> None:
        self._max_open = max_open
        self._rows: dict[tuple[Hashable, ...], int] = {}
        self._parents: list[int | None] = []
        self._priors: list[float] = []
        self._events: Floats = np.zeros((0, NUM_BINS))
        self._reached: Floats = np.zeros((0, NUM_BINS))
        """Stages that ended in each bin, and below the time they spent in it."""
        self._partial: Floats = np.zeros((0, NUM_BINS))
        self.index: Floats = np.zeros((0, NUM_BINS))
        """Uses per request that keeping gives, by row and age bin."""
        self._open: dict[Stage, None] = {}
        self._changes = 0
        self._refreshed_at = 0
        self._latest: tuple[int, tuple[int, int]] | None = None

    def row(self, key: tuple[Hashable, ...], prior: float = 1.0) -> int:
        """The row of class ``key``; ``key[:-1]`` is its parent. ``prior`` scales what is believed of a class without any
        evidence, at the top of its line: one use in ``(age + 16) / prior`` requests. O(len(key)) the first time."""
        found = self._rows.get(key)
        if found is not None:
            return found
        parent = self.row(key[:-1], prior) if len(key) > 1 else None
        row = self._rows[key] = len(self._parents)
        self._parents.append(parent)
        self._priors.append(prior)
        empty = np.zeros((1, NUM_BINS))
        self._events = np.vstack((self._events, empty))
        self._reached = np.vstack((self._reached, empty))
        self._partial = np.vstack((self._partial, empty))
        start = self._prior(row) if parent is None else self.index[parent]
        self.index = np.vstack((self.index, start[None, :]))
        return row

    def open(self, row: int, now: int) -> Stage:
        """An item enters a class."""
        stage = Stage(row, now)
        self._open[stage] = None
        if len(self._open) > self._max_open:
            self.close(next(iter(self._open)), now, used=False)
        return stage

    def close(self, stage: Stage, now: int, used: bool) -> None:
        """The stage ends: by a use (real, or reported by a ghost), or otherwise. Closing it again changes nothing."""
        if stage not in self._open:
            return
        del self._open[stage]
        age = now - stage.entered
        place = stage.row, bisect_right(_EDGE_LIST, age) - 1
        self._latest = (now, place) if used else None
        self._reached[place] += 1.0
        self._partial[place] += age - _EDGE_LIST[place[1]] + 0.5
        if used:
            self._events[place] += 1.0
            self._changes += 1

    def retract(self, now: int) -> None:
        """The use that was closed latest, at ``now``, was none of its own: it stood in for another item."""
        if self._latest is not None and self._latest[0] == now:
            self._events[self._latest[1]] -= 1.0
            self._latest = None

    def num_uses(self, row: int) -> float:
        """Uses counted in the class of ``row`` itself; those long past count for less."""
        return float(self._events[row].sum())

    def refresh(self, now: int) -> bool:
        """Recompute the indices if enough has happened since the last time; says whether it did."""
        waited = now - self._refreshed_at
        due = max(8, min(now // 16, 64), len(self._open) // 32)
        if waited < due or (not self._changes and waited < 64):
            return False
        self._refreshed_at = now
        self._changes = 0
        exposure, events = self._at_risk(now), self._events.copy()
        for row in range(len(self._parents) - 1, -1, -1):
            parent = self._parents[row]
            if parent is not None:
                exposure[parent] += exposure[row]
                events[parent] += events[row]
        hazard = np.empty_like(exposure)
        for row, parent in enumerate(self._parents):
            if parent is None:
                shape, weight, doubt = self._prior(row), 1.0, 0.0
            else:
                shape, weight, doubt = hazard[parent], SHAPE_WEIGHT, DOUBT
            level = _level(float(events[row].sum()), float(exposure[row] @ shape), doubt)
            inherited = level * shape
            hazard[row] = (events[row] + weight) / (exposure[row] + weight / inherited)
        self.index = index_of(hazard)
        self._forget()
        return True

    def _prior(self, row: int) -> Floats:
        return self._priors[row] / (EDGES + WIDTHS / 2 + 16.0)

    def _at_risk(self, now: int) -> Floats:
        """Time spent in each bin by all stages, ended or not, by row."""
        count = len(self._open)
        rows = np.fromiter((stage.row for stage in self._open), np.int64, count)
        ages = now - np.fromiter((stage.entered for stage in self._open), np.int64, count)
        bins = age_bins(ages)
        reached, partial = self._reached.copy(), self._partial.copy()
        np.add.at(reached, (rows, bins), 1.0)
        np.add.at(partial, (rows, bins), ages - EDGES[bins] + 0.5)
        beyond = np.cumsum(reached[:, ::-1], axis=1)[:, ::-1] - reached
        return np.asarray(beyond * WIDTHS + partial)

    def _forget(self) -> None:
        heavy = self._events.sum(axis=1) > MEMORY
        self._events[heavy] *= 0.5
        self._reached[heavy] *= 0.5
        self._partial[heavy] *= 0.5


def _level(uses: float, foretold: float, doubt: float) -> float:
    """Uses per use foretold, where the difference exceeds doubt; one use is believed of either beforehand."""
    difference = uses - foretold
    clear = max(0.0, abs(difference) - doubt * max(uses, foretold, 1.0) ** 0.5)
    believed = foretold + (clear if difference > 0 else -clear)
    return float(max((believed + 1.0) / (foretold + 1.0), 1e-3))


def index_of(hazard: Floats) -> Floats:
    """max over T of P(use within T) / E[time until then], for every row and every bin to start from."""
    steps = np.minimum(hazard * WIDTHS, 8.0)
    total = np.concatenate((np.zeros((len(hazard), 1)), np.cumsum(steps, axis=1)), axis=1)
    survive = np.exp(-total)
    spent = np.concatenate(
        (
            np.zeros((len(hazard), 1)),
            np.cumsum(survive[:, :-1] * -np.expm1(-steps) * WIDTHS / steps, axis=1),
        ),
        axis=1,
    )
    best = np.zeros_like(hazard)
    for start in range(NUM_BINS):
        used = survive[:, start, None] - survive[:, start + 1 :]
        time = spent[:, start + 1 :] - spent[:, start, None]
        rate = np.divide(used, time, out=np.zeros_like(used), where=time > 0)
        best[:, start] = rate.max(axis=1)
    tiny = survive[:, :-1] < 1e-280
    best[tiny] = hazard[tiny]
    return best
