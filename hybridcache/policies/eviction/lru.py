"""Least recently used: the baseline of every study."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from heapq import heapify, heappop, heappush, heapreplace
from itertools import chain

from hybridcache.radix.protocol import EvictionPolicy, Item, Kind

QueueEntry = tuple[int, int, Item]
"""(last use when entered, serial, item): sort key of candidates."""


class LRU(EvictionPolicy):
    """Evict the least recently used item of either kind; ties in order of creation.

    ``touch`` does nothing, because items only become younger: an outdated entry is moved when it
    reaches the front. ``discard`` only marks the entry as stale. O(log n) amortised per call, O(1)
    if items are added in order of use.

    Called about ten times per request, so it implements the priority classes of
    ``policies.eviction.priority_classes`` itself.
    """

    orders_classes = False

    def __init__(self, priority_classes: bool = False) -> None:
        self.has_priority_classes = priority_classes
        self._kv, self._checkpoints = _Line(), _Line()
        self._dead = _Line() if priority_classes else self._kv
        self._superseded = _Line() if priority_classes else self._checkpoints

    def add(self, item: Item) -> None:
        item.memo = entry = (item.last_used, item.serial, item)
        if item.kind == "kv":
            line = self._dead if item.dead else self._kv
        else:
            line = self._superseded if item.superseded else self._checkpoints
        entries: deque[QueueEntry] | list[QueueEntry] = line.queue
        if entries and entry < entries[-1]:
            entries = line.late
            heappush(line.late, entry)
        else:
            entries.append(entry)
        if len(entries) > line.limit:
            line.sweep()

    def discard(self, item: Item, evicted: bool) -> None:
        item.memo = None

    def candidates(self) -> Iterator[Item]:
        """Return all candidates, unordered. O(n)."""
        lines = {self._kv, self._checkpoints, self._dead, self._superseded}
        return (entry[2] for line in lines for entry in line if entry[2].memo is entry)

    def victim(self, kind: Kind | None) -> Item | None:
        if kind == "kv":
            return self._dead.oldest() or self._kv.oldest()
        if kind == "checkpoint":
            return self._superseded.oldest() or self._checkpoints.oldest()
        if self._dead is not self._kv:
            victim = self._dead.oldest() or self._superseded.oldest()
            if victim is not None:
                return victim
        kv, checkpoint = self._kv.oldest(), self._checkpoints.oldest()
        if kv is None or checkpoint is None:
            return kv or checkpoint
        return kv if kv.memo < checkpoint.memo else checkpoint


class _Line:
    """Candidates of one priority class and kind, oldest first.

    Most arrive in order and are appended to a queue. Others go to a heap: nodes that became leaves,
    and items used since they were added. With a single heap for all, a pop would read two cold
    entries per level, which is half the cost of an eviction at 100,000 nodes.

    An entry is stale if its item has another memo. Stale entries are removed at the front, or all
    at once when the line has doubled.
    """

    def __init__(self) -> None:
        self.queue: deque[QueueEntry] = deque()
        self.late: list[QueueEntry] = []
        self.limit = 64
        """Length of queue or heap at which stale entries are removed."""

    def __iter__(self) -> Iterator[QueueEntry]:
        return chain(self.queue, self.late)

    def oldest(self) -> Item | None:
        """Return the least recently used item, removing stale entries before it. O(log n)
        amortised."""
        queue, late = self.queue, self.late
        first: QueueEntry | None = None
        while queue:
            entry = queue[0]
            item = entry[2]
            if item.memo is entry:
                if item.last_used == entry[0]:
                    first = entry
                    break
                item.memo = entry = (item.last_used, entry[1], item)
                heappush(late, entry)
            queue.popleft()
        while late:
            entry = late[0]
            item = entry[2]
            if item.memo is not entry:
                heappop(late)
            elif item.last_used > entry[0]:
                item.memo = entry = (item.last_used, entry[1], item)
                heapreplace(late, entry)
            else:
                return item if first is None or entry < first else first[2]
        return None if first is None else first[2]

    def sweep(self) -> None:
        """Remove all stale entries. O(n), amortised over n additions."""
        self.queue = deque(entry for entry in self.queue if entry[2].memo is entry)
        self.late = [entry for entry in self.late if entry[2].memo is entry]
        heapify(self.late)
        self.limit = 64 + 2 * max(len(self.queue), len(self.late))
