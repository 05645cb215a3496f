"""Bases of policies with one score per item, ordered by a heap or by sampling, and their arrays.

A user's policy:

>>> class ShallowLast(ScorePolicy):
...     'Evicts the deepest item first.'
...
...     def score(self, item: Item) -> float:
...         return -item.position
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Iterable
from heapq import heapify, heappop, heappush, heapreplace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from hybridcache.radix.protocol import EvictionPolicy, Item, Kind, PolicyError

Score = float | tuple[float, ...]
"""Sort key of candidates. All scores of a policy must be comparable."""

_Entry = tuple[Score, int, Item]


class ScorePolicy(EvictionPolicy):
    """Evict the candidate with the least ``score``, of either kind; ties in order of creation.

    ``score`` is computed when an item is added, after each use, and again when it reaches the top
    of the heap. This handles scores that grow in between, for example after the eviction of a
    neighbour. Use ``SampledPolicy`` for scores that decrease without a use. ``score`` may read
    ``now``. O(log n) amortised per call.

    Raises:
        PolicyError: a score cannot be ordered, for example NaN.
    """

    def __init__(self) -> None:
        self.now = 0
        """Logical time of the newest use."""
        self._heaps: dict[Kind, list[_Entry]] = {"kv": [], "checkpoint": []}
        self._entries: dict[Kind, dict[Item, _Entry]] = {"kv": {}, "checkpoint": {}}
        self._chosen: _Entry | None = None

    @abstractmethod
    def score(self, item: Item) -> Score:
        """Return the value of keeping ``item``, in any unit."""

    def evicted(self, item: Item, score: Score) -> None:
        """Process the eviction of this policy's victim. ``score`` is its last score."""

    def add(self, item: Item) -> None:
        self.now = max(self.now, item.last_used)
        heap, entries = self._heaps[item.kind], self._entries[item.kind]
        entries[item] = entry = (_checked(self, item), item.serial, item)
        heappush(heap, entry)
        if len(heap) > 64 + 3 * len(entries):
            heap[:] = entries.values()
            heapify(heap)

    touch = add

    def discard(self, item: Item, evicted: bool) -> None:
        entry = self._entries[item.kind].pop(item)
        if self._chosen is entry:
            self._chosen = None
            if evicted:
                self.evicted(item, entry[0])

    def candidates(self) -> Iterable[Item]:
        return chain(*self._entries.values())

    def victim(self, kind: Kind | None) -> Item | None:
        kinds: tuple[Kind, ...] = ("kv", "checkpoint") if kind is None else (kind,)
        tops = [top for each in kinds if (top := self._top(each)) is not None]
        self._chosen = min(tops, key=lambda entry: (entry[0], entry[1])) if tops else None
        return self._chosen[2] if self._chosen else None

    def _top(self, kind: Kind) -> _Entry | None:
        heap, entries = self._heaps[kind], self._entries[kind]
        asked: set[int] = set()
        while heap:
            entry = heap[0]
            item = entry[2]
            if entries.get(item) is not entry:
                heappop(heap)
                continue
            # Each item is scored once per call, or a nondeterministic score could loop forever.
            if entry[1] in asked:
                return entry
            score = _checked(self, item)
            if score == entry[0]:
                return entry
            asked.add(entry[1])
            entries[item] = fresh = (score, entry[1], item)
            heapreplace(heap, fresh)
        return None


class SampledPolicy(EvictionPolicy):
    """Evict the least ``score`` of ``sample`` random candidates, for scores that change over time.

    With ``sample`` candidates or fewer, all are examined. Both kinds are drawn together if either
    may be evicted. Deterministic for a given ``seed``. O(sample).

    Raises:
        PolicyError: a score cannot be ordered, for example NaN.
    """

    sample = 64

    def __init__(self, seed: int = 0) -> None:
        self.now = 0
        self.random = random.Random(seed)
        self._bags: dict[Kind, list[Item]] = {"kv": [], "checkpoint": []}
        self._places: dict[Item, int] = {}
        self._chosen: Item | None = None

    @abstractmethod
    def score(self, item: Item) -> Score:
        """Return the value of keeping ``item`` at time ``now``."""

    def evicted(self, item: Item) -> None:
        """Process the eviction of this policy's victim."""

    def add(self, item: Item) -> None:
        self.now = max(self.now, item.last_used)
        bag = self._bags[item.kind]
        self._places[item] = len(bag)
        bag.append(item)

    def touch(self, item: Item) -> None:
        self.now = max(self.now, item.last_used)

    def discard(self, item: Item, evicted: bool) -> None:
        bag = self._bags[item.kind]
        place, last = self._places.pop(item), bag.pop()
        if last is not item:
            bag[place] = last
            self._places[last] = place
        if self._chosen is item:
            self._chosen = None
            if evicted:
                self.evicted(item)

    def candidates(self) -> Iterable[Item]:
        return chain(*self._bags.values())

    def victim(self, kind: Kind | None) -> Item | None:
        """Return the least of the drawn candidates (with repeats). O(sample)."""
        drawn = self._draw(self._bags.values() if kind is None else (self._bags[kind],))
        self._chosen = min(
            drawn, key=lambda item: (_checked(self, item), item.serial), default=None
        )
        return self._chosen

    def _draw(self, bags: Iterable[list[Item]]) -> Iterable[Item]:
        """Return all items, or ``sample`` of them with equal probability."""
        first, *rest = bags
        count = len(first) + sum(map(len, rest))
        if count <= self.sample:
            return chain(first, *rest)
        places = self.random.choices(range(count), k=self.sample)
        if not rest:
            return [first[place] for place in places]
        [second], border = rest, len(first)
        return [first[at] if at < border else second[at - border] for at in places]


def _checked(policy: ScorePolicy | SampledPolicy, item: Item) -> Score:
    """Return the score. Raises PolicyError if it is not a number or a tuple of numbers, or NaN."""
    score = policy.score(item)
    if type(score) in (float, int) and score == score:
        return score
    parts = score if isinstance(score, tuple) else (score,)
    if all(isinstance(part, float | int | np.number) and part == part for part in parts):
        return score
    raise PolicyError(
        f"{type(policy).__name__}.score returned {score!r} for a {item.kind} item: "
        "a number or a tuple of numbers is required"
    )


# --- Candidates as parallel arrays ----------------------------------------------------------------


class Seat:
    """Memo of a candidate that can be in ``Columns``: its place there, or -1."""

    __slots__ = ("place",)

    def __init__(self) -> None:
        self.place = -1


class Columns:
    """Items with three numbers each, so that a victim is one vector expression.

    The memo of an item is a ``Seat``, because a dict of places would take 40 to 70 bytes per item
    and two cold cache lines per look-up.

    ``cells``: start of the item's class in a table of all classes. ``times``: logical time of the
    last use, or of the entry into the class. ``worths``: value of a use per byte.
    """

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._hold(np.zeros(64, np.int64), np.zeros(64, np.int64), np.zeros(64))

    def _hold(self, *columns: npt.NDArray[Any]) -> None:
        self.cells, self.times, self.worths = columns
        # Single numbers are read and written faster than in an array.
        self._views: list[Any] = [column.data for column in columns]

    def put(self, item: Item, cell: int, time: int, worth: float) -> None:
        """Add ``item`` or change its numbers. O(1) amortised."""
        place = item.memo.place
        if place < 0:
            place = item.memo.place = len(self.items)
            self.items.append(item)
            if place == len(self.cells):
                self._hold(*map(doubled, (self.cells, self.times, self.worths)))
        cells, times, worths = self._views
        cells[place], times[place], worths[place] = cell, time, worth

    def remove(self, item: Item) -> None:
        """Remove ``item``, which is present; the last item takes its place. O(1)."""
        place, last = item.memo.place, self.items.pop()
        if last is not item:
            end = len(self.items)
            self.items[place] = last
            last.memo.place = place
            cells, times, worths = self._views
            cells[place], times[place], worths[place] = cells[end], times[end], worths[end]
        item.memo.place = -1


def doubled(table: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return ``table`` with as many rows of zeros after its own."""
    return np.concatenate((table, np.zeros_like(table)))
