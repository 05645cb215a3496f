"""Least recently used first: the default, and the base line of every study."""

from __future__ import annotations

from collections import OrderedDict
from heapq import heapify, heappop, heappush

from hybridcache.policies.protocol import Item, Kind

Key = tuple[int, int]
"""(last use, serial): what candidates are ordered by."""


class LRU:
    """Least recently used first, over both kinds; ties go in order of creation.

    ``touch`` does nothing: an item only ever grows younger, so one that was used where it stands is put in its place when it
    comes to the front. Amortised O(log n) each, O(1) in order of use.

    Any class with these five methods is a policy; ``CacheConfig(eviction="module:Class")`` uses one of your own. This one is
    the default and called ten times a request, so it keeps the tiers of ``policies.tiers`` itself.
    """

    def __init__(self, dead_first: bool = False, demote_superseded: bool = False) -> None:
        self._kv, self._checkpoints = _Line(), _Line()
        self._dead = _Line() if dead_first else self._kv
        self._superseded = _Line() if demote_superseded else self._checkpoints

    def add(self, item: Item) -> None:
        if item.kind == "kv":
            line = self._dead if item.dead else self._kv
        else:
            line = self._superseded if item.superseded else self._checkpoints
        last_used = item.last_used
        key = (last_used, item.serial)
        if key > line.newest:
            line.newest = key
            item.memo = queue = line.queue
            queue[item] = last_used
        else:
            line.add_late(key, item)

    def discard(self, item: Item) -> None:
        del item.memo[item]
        item.memo = None

    def touch(self, item: Item) -> None:
        """Nothing to do: see above."""

    def missed(self, item: Item) -> None:
        """Recency does not learn from ghosts."""

    def victim(self, kind: Kind | None) -> Item | None:
        if kind == "kv":
            return self._dead.oldest() or self._kv.oldest()
        if kind == "checkpoint":
            return self._superseded.oldest() or self._checkpoints.oldest()
        if self._dead is not self._kv and (dead := self._dead.oldest()) is not None:
            return dead
        if self._superseded is not self._checkpoints:
            superseded = self._superseded.oldest()
            if superseded is not None:
                return superseded
        kv, checkpoint = self._kv.oldest(), self._checkpoints.oldest()
        if kv is None or checkpoint is None:
            return kv or checkpoint
        return kv if _key(kv) < _key(checkpoint) else checkpoint


class _Line:
    """Candidates of one tier and kind, oldest first. Nearly all come in order and stand in a queue, an ordered dict from the
    item to its last use when it came; one that belongs further back (of a node that became a leaf, or used where it stood)
    goes to a heap. Were all in one heap, a pop would read two cold entries at each level: half of what an eviction costs at
    100,000 nodes.

    ``memo`` of an item is the dict that has it: ``queue`` or ``late``. What left ``late`` is stale in the heap.
    """

    __slots__ = ("heap", "late", "newest", "queue")

    def __init__(self) -> None:
        self.queue: OrderedDict[Item, int] = OrderedDict()
        self.newest: Key = (-1, -1)
        """The key of what came to the queue last."""
        self.late: dict[Item, Key] = {}
        self.heap: list[tuple[Key, Item]] = []

    def add_late(self, key: Key, item: Item) -> None:
        """O(log n), amortised."""
        item.memo, self.late[item] = self.late, key
        heappush(self.heap, (key, item))
        if len(self.heap) > 64 + 2 * len(self.late):
            self.heap = [(key, item) for item, key in self.late.items()]
            heapify(self.heap)

    def oldest(self) -> Item | None:
        """The least recently used. Amortised O(log n)."""
        queue, late = self.queue, self.late
        first: Item | None = None
        while queue:
            first = next(iter(queue))
            if first.last_used == queue[first]:
                break
            del queue[first]
            self.add_late(_key(first), first)
            first = None
        while late:
            key, item = self.heap[0]
            if late.get(item) != key:
                heappop(self.heap)
            elif item.last_used > key[0]:
                heappop(self.heap)
                self.add_late(_key(item), item)
            elif first is None or key < _key(first):
                return item
            else:
                break
        return first


def _key(item: Item) -> Key:
    return item.last_used, item.serial
