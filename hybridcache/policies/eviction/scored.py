"""Policies with one score per item, ordered by a heap or by sampling, and their base classes.

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
from collections import OrderedDict
from collections.abc import Iterable
from heapq import heapify, heappop, heappush, heapreplace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from hybridcache.policies.protocol import EvictionPolicy, Item, Kind, PolicyError

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


# --- Policies with one score ----------------------------------------------------------------------


class FIFO(ScorePolicy):
    """Evict the item that entered the cache first, regardless of uses.

    Source: folklore; the control of caching studies.
    Two kinds, unequal sizes: one order over both. Sizes are ignored.
    """

    orders_classes = False

    def score(self, item: Item) -> float:
        return item.created


class Random(SampledPolicy):
    """Evict a uniformly random candidate. Deterministic for a given seed.

    Source: folklore; a control on loops, where LRU has no hits.
    Two kinds: drawn together, so the kind with more candidates loses more.
    """

    orders_classes = False

    sample = 1

    def score(self, item: Item) -> float:
        return 0.0


class _Ageing(ScorePolicy):
    """Scores on top of an age: the last victim's score, as of the item's latest use. So items with
    many old uses expire."""

    orders_classes = False

    def __init__(self) -> None:
        super().__init__()
        self.age = 0.0

    def age_of(self, item: Item) -> float:
        """Return the age at the latest use of ``item``. ``memo`` stores (uses, age)."""
        if item.memo is None or item.memo[0] != item.uses:
            item.memo = (item.uses, self.age)
        return float(item.memo[1])

    def evicted(self, item: Item, score: Score) -> None:
        assert isinstance(score, float)
        self.age = max(self.age, score)


class LFU(_Ageing):
    """Evict the least used item; new items start at the score of the last victim (LFU-DA).

    Source: Arlitt et al., "Evaluating content management techniques for Web proxy caches", 2000.
    Two kinds: one order over both. Sizes are ignored (``gdsf`` adds sizes and costs).
    """

    def score(self, item: Item) -> float:
        return item.uses + 1 + self.age_of(item)


class GDSF(_Ageing):
    """Evict the least age + uses * span / bytes freed.

    Source: Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency", 1998;
    as PGDSF in RAGCache (arXiv:2404.12457).
    Two kinds, unequal sizes: cost is ``span``, size is ``size_bytes`` in MiB; one order over both.
    """

    def score(self, item: Item) -> float:
        return self.age_of(item) + (item.uses + 1) * item.span / (item.size_bytes / 2**20)


NUM_AGES = 24
"""Age bins. Bin b contains ages in [2**b - 1, 2**(b + 1) - 1) requests."""
NUM_CLASSES = 4
"""Classes by uses: 0, 1, 2, 3 or more."""
RECOMPUTE_EVERY = 256
DECAY = 0.9


class LHD(SampledPolicy):
    """Evict the least expected hits per byte and remaining lifetime, among 64 samples.

    Source: Beckmann, Chen, Cidon, "LHD: improving cache hit rate by maximizing hit density"
    (NSDI'18). For each class (kind, uses) the policy counts the ages of uses and evictions. The
    density at age a is hits from a on / time lived from a on. It is recomputed every 256 events
    from counts that decay by 0.9.
    Two kinds, unequal sizes: the kind is part of the class; density is per byte of ``size_bytes``.
    """

    orders_classes = False

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        shape = (2 * NUM_CLASSES, NUM_AGES)
        self._hits, self._evictions = np.zeros(shape), np.zeros(shape)
        self._density = np.tile(1.0 / (1 << np.arange(NUM_AGES)), (shape[0], 1))
        self._events = 0

    def score(self, item: Item) -> float:
        return float(self._density[self._place(item, item.uses)]) / item.size_bytes

    def add(self, item: Item) -> None:
        super().add(item)
        self._count_use(item)

    def touch(self, item: Item) -> None:
        super().touch(item)
        self._count_use(item)

    def evicted(self, item: Item) -> None:
        self._evictions[self._place(item, item.uses)] += 1
        self._event()

    def _count_use(self, item: Item) -> None:
        """Count a new use. ``memo`` stores (uses, last use) at the last update."""
        if item.memo is not None and item.uses > item.memo[0]:
            row, _ = self._place(item, item.memo[0])
            self._hits[row, _age_bin(item.last_used - item.memo[1])] += 1
            self._event()
        item.memo = (item.uses, item.last_used)

    def _place(self, item: Item, uses: int) -> tuple[int, int]:
        row = min(uses, NUM_CLASSES - 1) + NUM_CLASSES * (item.kind == "checkpoint")
        return row, _age_bin(self.now - item.last_used)

    def _event(self) -> None:
        self._events += 1
        if self._events % RECOMPUTE_EVERY:
            return
        widths = np.exp2(np.arange(NUM_AGES))
        ended = self._hits + self._evictions
        hits_from = np.cumsum(self._hits[:, ::-1], axis=1)[:, ::-1]
        alive = np.cumsum(ended[:, ::-1], axis=1)[:, ::-1]
        lived_from = np.cumsum((alive * widths)[:, ::-1], axis=1)[:, ::-1]
        known = lived_from > 0
        self._density[known] = hits_from[known] / lived_from[known]
        self._hits *= DECAY
        self._evictions *= DECAY


def _age_bin(age: int) -> int:
    return min((age + 1).bit_length() - 1, NUM_AGES - 1)


# --- Candidates as parallel arrays ----------------------------------------------------------------


class Columns:
    """Items with three numbers each, so that a victim is one vector expression.

    ``cells``: start of the item's class in a table of all classes. ``times``: logical time of the
    last use, or of the entry into the class. ``worths``: value of a use per byte.
    """

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.places: dict[Item, int] = {}
        self._hold(np.zeros(64, np.int64), np.zeros(64, np.int64), np.zeros(64))

    def _hold(self, *columns: npt.NDArray[Any]) -> None:
        self.cells, self.times, self.worths = columns
        # Single numbers are read and written faster than in an array.
        self._views: list[Any] = [column.data for column in columns]

    def put(self, item: Item, cell: int, time: int, worth: float) -> None:
        """Add ``item`` or change its numbers. O(1) amortised."""
        place = self.places.get(item)
        if place is None:
            place = self.places[item] = len(self.items)
            self.items.append(item)
            if place == len(self.cells):
                self._hold(*map(doubled, (self.cells, self.times, self.worths)))
        cells, times, worths = self._views
        cells[place], times[place], worths[place] = cell, time, worth

    def remove(self, item: Item) -> None:
        """Remove ``item``; the last item takes its place. O(1). Raises KeyError if it is absent."""
        place, last = self.places.pop(item), self.items.pop()
        if last is not item:
            end = len(self.items)
            self.items[place] = last
            self.places[last] = place
            for view in self._views:
                view[place] = view[end]


def doubled(table: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return ``table`` with as many rows of zeros after its own."""
    return np.concatenate((table, np.zeros_like(table)))


ATTENTION_TOKENS = 30_000
"""Position at which attention to all earlier tokens costs as much as the rest of the model (with
the sizes of Qwen3-Next)."""


class Marconi(EvictionPolicy):
    """Evict the least recency + alpha * FLOPs saved per byte, both min-max normalised.

    Source: Pan et al., "Marconi: prefix caching for the era of hybrid LLMs" (MLSys'25), Eq. 1 and
    2. ``alpha`` 0 is LRU. FLOPs count from the checkpoint above to this one, with attention growing
    with position.
    The paper's candidates are nodes with at most one child, but policies cannot see forks.
    O(candidates) per victim, in one vector expression.

    The alpha tuned by replay and the clairvoyant one need the replay of a whole cache; see
    ``hybridcache.lab.baselines.MarconiCache``.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha
        self._dead: OrderedDict[Item, None] = OrderedDict()
        self._columns: dict[Kind, Columns] = {"kv": Columns(), "checkpoint": Columns()}

    def add(self, item: Item) -> None:
        if item.dead:
            self._dead[item] = None
        else:
            self._columns[item.kind].put(item, 0, item.last_used, efficiency(item))

    touch = add

    def discard(self, item: Item, evicted: bool) -> None:
        if item in self._dead:
            del self._dead[item]
        else:
            self._columns[item.kind].remove(item)

    def victim(self, kind: Kind | None) -> Item | None:
        """Return dead KV, else the least checkpoint, else the least leaf KV. O(candidates)."""
        if kind != "checkpoint" and self._dead:
            return next(iter(self._dead))
        if kind is not None:
            return self._least(self._columns[kind])
        return self._least(self._columns["checkpoint"]) or self._least(self._columns["kv"])

    def _least(self, columns: Columns) -> Item | None:
        """Return the candidate with the least score. A value that is too low after an eviction
        above is updated, and the search repeated."""
        count = len(columns.items)
        if not count:
            return None
        recency = _normalised(columns.times[:count].astype(np.float64))
        while True:
            score = recency + self.alpha * _normalised(columns.worths[:count])
            place = int(np.argmin(score))
            item = columns.items[place]
            worth = efficiency(item)
            if worth <= columns.worths[place]:
                return item
            columns.worths[place] = worth


def efficiency(item: Item) -> float:
    """Return the FLOPs saved per byte (Eq. 1), in units of one token's FLOPs."""
    middle = item.position - item.span / 2
    return item.span * (1 + middle / ATTENTION_TOKENS) / item.size_bytes


def _normalised(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)
