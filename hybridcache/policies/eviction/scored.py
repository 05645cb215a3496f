"""Two ways to write a policy in twenty lines: a score per item, kept in a heap or looked at by
sampling.

A policy of your own, in a file of your own, named on the command line as ``module:Class``:

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
from typing import Any, cast

from hybridcache.policies.protocol import EvictionPolicy, Item, Kind, PolicyError

Score = float | tuple[float, ...]
"""What candidates are ordered by; one policy's scores must compare with each other."""

_Entry = tuple[Score, int, Item]


class ScorePolicy(EvictionPolicy):
    """The candidate of least ``score`` goes first; ties go in order of creation. Both kinds compare
    by the same score.

    ``score`` is asked when an item becomes a candidate, after each use, and again when it comes to
    the top: a score that only grows in between (because a neighbour went) is caught there. It may
    read ``now``. A score that falls by itself wants ``SampledPolicy``. O(log n) amortised per call.
    PolicyError where a score is NaN or no number.
    """

    def __init__(self) -> None:
        self.now = 0
        """Logical time of the newest use seen."""
        self._heaps: dict[Kind, list[_Entry]] = {"kv": [], "checkpoint": []}
        self._entries: dict[Kind, dict[Item, _Entry]] = {"kv": {}, "checkpoint": {}}
        self._chosen: _Entry | None = None

    @abstractmethod
    def score(self, item: Item) -> Score:
        """Worth of keeping ``item``, in any unit."""

    def evicted(self, item: Item, score: Score) -> None:
        """``item`` was this policy's victim and is gone; ``score`` was its last. For policies that
        age by it."""

    def add(self, item: Item) -> None:
        """Asks its score. O(log n) amortised."""
        self.now = max(self.now, item.last_used)
        self._enter(item)

    def touch(self, item: Item) -> None:
        """Asks its score anew. O(log n) amortised."""
        self.now = max(self.now, item.last_used)
        self._enter(item)

    def discard(self, item: Item, evicted: bool) -> None:
        """O(1): its entry goes stale. Calls ``evicted`` where the latest victim leaves the
        cache."""
        entry = self._entries[item.kind].pop(item)
        if self._chosen is entry:
            self._chosen = None
            if evicted:
                self.evicted(item, entry[0])

    def candidates(self) -> Iterable[Item]:
        """All it holds, in no order. O(n)."""
        return chain(*self._entries.values())

    def victim(self, kind: Kind | None) -> Item | None:
        """The top of a heap, or of both, once its score is still what it was. O(log n)
        amortised."""
        kinds: tuple[Kind, ...] = ("kv", "checkpoint") if kind is None else (kind,)
        tops = [top for each in kinds if (top := self._top(each)) is not None]
        self._chosen = min(tops, key=lambda entry: (entry[0], entry[1])) if tops else None
        return self._chosen[2] if self._chosen else None

    def _enter(self, item: Item) -> None:
        heap, entries = self._heaps[item.kind], self._entries[item.kind]
        entries[item] = entry = (_checked(self, item), item.serial, item)
        heappush(heap, entry)
        if len(heap) > 64 + 3 * len(entries):
            heap[:] = entries.values()
            heapify(heap)

    def _top(self, kind: Kind) -> _Entry | None:
        heap, entries = self._heaps[kind], self._entries[kind]
        asked: set[int] = set()
        while heap:
            entry = heap[0]
            item = entry[2]
            if entries.get(item) is not entry:
                heappop(heap)
                continue
            # Asked once a call: a score that is never twice the same must not go round for ever.
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
    """The candidate of least ``score`` among ``sample`` drawn at random goes first: for scores that
    drift with time.

    All candidates are looked at while there are no more than ``sample``; both kinds lie in one urn
    where either may go. Deterministic under ``seed``. O(sample). PolicyError where a score is NaN
    or no number.
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
        """Worth of keeping ``item`` at time ``now``."""

    def evicted(self, item: Item) -> None:
        """``item`` was this policy's victim and is gone."""

    def add(self, item: Item) -> None:
        """Into the bag of its kind. O(1)."""
        self.now = max(self.now, item.last_used)
        bag = self._bags[item.kind]
        self._places[item] = len(bag)
        bag.append(item)

    def touch(self, item: Item) -> None:
        """Moves the clock only: scores are asked when a victim is."""
        self.now = max(self.now, item.last_used)

    def discard(self, item: Item, evicted: bool) -> None:
        """Out of its bag; calls ``evicted`` where the latest victim leaves the cache. O(1)."""
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
        """All it holds, in no order. O(n)."""
        return chain(*self._bags.values())

    def victim(self, kind: Kind | None) -> Item | None:
        """The least of those drawn, with repeats. O(sample)."""
        drawn = self._draw(self._bags.values() if kind is None else (self._bags[kind],))
        self._chosen = min(
            drawn, key=lambda item: (_checked(self, item), item.serial), default=None
        )
        return self._chosen

    def _draw(self, bags: Iterable[list[Item]]) -> Iterable[Item]:
        """All of ``bags``, or ``sample`` of them, each as likely as any other."""
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
    """The score; ValueError where nothing can be ordered by it."""
    score: Any = policy.score(item)
    try:
        if score <= score and (type(score) is not tuple or all(part <= part for part in score)):
            return cast(Score, score)
    except (TypeError, ValueError):
        pass  # what has no order
    raise PolicyError(
        f"{type(policy).__name__}.score returned {score!r} for a {item.kind} item: "
        "a number, or a tuple of numbers, is needed"
    )
