"""SIEVE, and the bases of policies made of FIFO queues, with one instance per kind of item."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from sortedcontainers import SortedDict

from hybridcache.radix.protocol import EvictionPolicy, Item, Kind

RETURN_WITHIN = 16
"""Requests after a ghost hit within which a new checkpoint at its position counts as returned."""


class Queue:
    """Candidates in order of their tickets, oldest first. O(log n).

    An item gets a ticket when it is added. After a lock it returns to its old place.
    """

    def __init__(self) -> None:
        self.entries: SortedDict[int, tuple[Item, int]] = SortedDict()
        """(item, its size when it entered) by ticket."""
        self.num_bytes = 0
        """Sum of these sizes."""

    def __len__(self) -> int:
        return len(self.entries)

    def put(self, ticket: int, item: Item) -> None:
        """Add ``item`` at the place of ``ticket``, new or old."""
        self.entries[ticket] = item, item.size_bytes
        self.num_bytes += item.size_bytes

    def remove(self, ticket: int) -> None:
        self.num_bytes -= self.entries.pop(ticket)[1]

    def oldest(self) -> Item | None:
        return self.entries.peekitem(0)[1][0] if self.entries else None

    def after(self, ticket: int) -> Item:
        """Return the first item at or after ``ticket``, cyclically. Requires a non-empty queue."""
        place = self.entries.bisect_left(ticket) % len(self.entries)
        item: Item = self.entries.peekitem(place)[1][0]
        return item


@dataclass(eq=False, slots=True)
class QueueState:
    """State of an item in a queue policy, kept during locks: queue, place and number of uses."""

    owner: QueuePolicy
    queue: Queue
    ticket: int
    uses: int
    mark: int = 0


class QueuePolicy(ABC):
    """Base of queue policies, with one instance per kind (``BothKinds``). Shares are in bytes held.

    Uses during a lock are applied when the item returns. An item that changes its priority class
    (``priority_classes.py``) is new to the other instance. Ghosts are identified by position, not
    by path (``RETURN_WITHIN``).
    """

    def __init__(self) -> None:
        self._next_ticket = 0
        self._now = 0
        """Logical time of the newest item or use."""
        self._asked_back: dict[int, tuple[QueueState, int]] = {}
        """Ghost hits by position: (record, time)."""

    @abstractmethod
    def enter(self, item: Item, ghost: QueueState | None) -> Queue:
        """Return the queue for a new item. ``ghost`` is its record after a recent ghost hit."""

    def used(self, item: Item, record: QueueState) -> None:
        """Process one or more uses of a candidate since the last call: set its reference bit."""
        record.mark = 1

    @abstractmethod
    def choose(self) -> Item | None:
        """Return the candidate to evict, without removing it."""

    def gone(self, item: Item, record: QueueState, evicted: bool) -> None:  # noqa: B027
        """Process the removal of a candidate. If not ``evicted``, it can return."""

    def move(self, item: Item, queue: Queue) -> None:
        """Move ``item`` to the young end of ``queue``."""
        record: QueueState = item.memo
        record.queue.remove(record.ticket)
        record.queue, record.ticket = queue, self._ticket()
        queue.put(record.ticket, item)

    def add(self, item: Item) -> None:
        self._now = max(self._now, item.last_used)
        record: QueueState | None = item.memo
        if record is None or record.owner is not self:
            queue = self.enter(item, self._returned(item))
            item.memo = record = QueueState(self, queue, self._ticket(), item.uses)
        record.queue.put(record.ticket, item)
        self.touch(item)

    def touch(self, item: Item) -> None:
        self._now = max(self._now, item.last_used)
        record: QueueState = item.memo
        if item.uses > record.uses:
            record.uses = item.uses
            self.used(item, record)

    def discard(self, item: Item, evicted: bool) -> None:
        record: QueueState = item.memo
        record.queue.remove(record.ticket)
        self.gone(item, record, evicted)

    def on_ghost_hit(self, item: Item) -> None:
        if item.memo is not None:
            self._asked_back[item.position] = (item.memo, self._now)

    def _returned(self, item: Item) -> QueueState | None:
        """Return the ghost's record if ``item`` is a returned ghost, and not from another priority
        class."""
        if item.memo is not None:
            return None
        ghost, when = self._asked_back.pop(item.position, (None, 0))
        return ghost if item.created - when <= RETURN_WITHIN else None

    def _ticket(self) -> int:
        self._next_ticket += 1
        return self._next_ticket


class BothKinds(EvictionPolicy):
    """Policy with one instance of ``queues`` for KV and one for checkpoints. With a shared budget,
    the less recently used of both victims is evicted."""

    orders_classes = False

    def __init__(self, queues: Callable[[], QueuePolicy]) -> None:
        self._policies: dict[Kind, QueuePolicy] = {"kv": queues(), "checkpoint": queues()}

    def __str__(self) -> str:
        return type(self._policies["kv"]).__name__

    def add(self, item: Item) -> None:
        self._policies[item.kind].add(item)

    def touch(self, item: Item) -> None:
        self._policies[item.kind].touch(item)

    def discard(self, item: Item, evicted: bool) -> None:
        self._policies[item.kind].discard(item, evicted)

    def on_ghost_hit(self, item: Item) -> None:
        self._policies[item.kind].on_ghost_hit(item)

    def victim(self, kind: Kind | None) -> Item | None:
        if kind is not None:
            return self._policies[kind].choose()
        kv, checkpoint = self._policies["kv"].choose(), self._policies["checkpoint"].choose()
        if kv is None or checkpoint is None:
            return kv or checkpoint
        return min(kv, checkpoint, key=lambda item: (item.last_used, item.serial))


# --- Policies -------------------------------------------------------------------------------------


class OneQueue(QueuePolicy):
    """Base of the policies with one queue."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = Queue()

    def enter(self, item: Item, ghost: QueueState | None) -> Queue:
        return self.queue


class Sieve(OneQueue):
    """Evict as CLOCK does, but leave survivors in place, so that new items are removed early.

    Source: Zhang et al., "SIEVE is simpler than LRU" (NSDI'24).
    Two kinds: one queue and one hand for each. Sizes are ignored.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hand = 0
        """Ticket at which the next search starts, or 0 for the oldest item."""
        self._chosen: Item | None = None

    def choose(self) -> Item | None:
        """Return the first unused item from the hand on. The hand clears bits it passes."""
        if not len(self.queue):
            return None
        while True:
            item = self.queue.after(self.hand)
            record: QueueState = item.memo
            if not record.mark:
                self.hand = record.ticket
                self._chosen = item
                return item
            record.mark = 0
            self.hand = record.ticket + 1

    def gone(self, item: Item, record: QueueState, evicted: bool) -> None:
        """Advance the hand to the next younger item. After the youngest it starts again."""
        if item is self._chosen:
            self._chosen = None
            self.hand = self.queue.after(record.ticket).memo.ticket if len(self.queue) else 0
