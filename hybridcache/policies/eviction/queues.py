"""Policies made of FIFO queues, one instance per kind of item, and their base classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from typing import ClassVar

from hybridcache.policies.protocol import EvictionPolicy, Item, Kind

RETURN_WITHIN = 16
"""Number of requests after a ghost hit within which a new checkpoint at its position counts as the
returned one."""


class Queue:
    """Candidates in order of their tickets, oldest first.

    An item gets a ticket when it is added. After a lock it returns to its old place. O(log n)
    comparisons, and a move of at most n machine words.
    """

    def __init__(self) -> None:
        self._tickets: list[int] = []
        self._items: dict[int, tuple[Item, int]] = {}
        """Item of each ticket, with its size when it entered."""
        self.num_bytes = 0
        """Sum of these sizes."""

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[Item]:
        """Iterate over the items, unordered."""
        return (item for item, _ in self._items.values())

    def put(self, ticket: int, item: Item) -> None:
        """Add ``item`` at the place of ``ticket``, new or old."""
        insort(self._tickets, ticket)
        num_bytes = item.size_bytes
        self._items[ticket] = item, num_bytes
        self.num_bytes += num_bytes

    def remove(self, ticket: int) -> None:
        """Remove the item of ``ticket``. Raises KeyError if there is none."""
        _, num_bytes = self._items.pop(ticket)
        del self._tickets[bisect_left(self._tickets, ticket)]
        self.num_bytes -= num_bytes

    def oldest(self) -> Item | None:
        """Return the item at the old end, or None if empty. O(1)."""
        return self._items[self._tickets[0]][0] if self._tickets else None

    def after(self, ticket: int) -> Item:
        """Return the first item at or after ``ticket``, cyclically. Requires a non-empty queue."""
        place = bisect_left(self._tickets, ticket)
        return self._items[self._tickets[place if place < len(self._tickets) else 0]][0]


class Record:
    """State of an item in a queue policy, kept during locks: queue, place and number of uses."""

    __slots__ = ("mark", "owner", "queue", "ticket", "uses")

    def __init__(self, owner: QueuePolicy, queue: Queue, ticket: int, uses: int) -> None:
        self.owner = owner
        """Instance that the item belongs to. A change of priority class moves it to another."""
        self.queue = queue
        self.ticket = ticket
        self.uses = uses
        self.mark = 0


class QueuePolicy(ABC):
    """Base of queue policies.

    A subclass defines the queue of a new item (``enter``), the effect of a use (``used``), and the
    candidate to evict (``choose``).

    Adaptation to two kinds and unequal sizes:

    - Each kind has a separate instance (``BothKinds``), and shares are in bytes held.
    - Uses during a lock are applied when the item returns.
    - An item that changes its priority class (``priority_classes.py``) is new to the other
      instance.
    - Ghosts are identified by position, not by path: the next new checkpoint at that position
      within 16 requests counts as the returned one.
    """

    def __init__(self) -> None:
        self._next_ticket = 0
        self._now = 0
        """Logical time of the newest item or use."""
        self._asked_back: dict[int, tuple[Record, int]] = {}
        """Ghost hits by position: (record, time)."""

    @abstractmethod
    def enter(self, item: Item, ghost: Record | None) -> Queue:
        """Return the queue for a new item. ``ghost`` is its record after a recent ghost hit."""

    def used(self, item: Item, record: Record) -> None:
        """Process one or more uses of a candidate since the last call: set its reference bit."""
        record.mark = 1

    @abstractmethod
    def choose(self) -> Item | None:
        """Return the candidate to evict, without removing it."""

    def gone(self, item: Item, record: Record, evicted: bool) -> None:  # noqa: B027
        """Process the removal of a candidate. If not ``evicted``, it can return."""

    def move(self, item: Item, queue: Queue) -> None:
        """Move ``item`` to the young end of ``queue``."""
        record: Record = item.memo
        record.queue.remove(record.ticket)
        record.queue, record.ticket = queue, self._ticket()
        queue.put(record.ticket, item)

    def add(self, item: Item) -> None:
        """Add a new item, or return an unlocked one to its place. O(log n)."""
        self._now = max(self._now, item.last_used)
        record: Record | None = item.memo
        if record is None or record.owner is not self:
            queue = self.enter(item, self._returned(item))
            item.memo = record = Record(self, queue, self._ticket(), item.uses)
            record.queue.put(record.ticket, item)
        else:
            record.queue.put(record.ticket, item)
            self.touch(item)

    def touch(self, item: Item) -> None:
        """Call ``used`` once if ``uses`` has grown."""
        self._now = max(self._now, item.last_used)
        record: Record = item.memo
        if item.uses > record.uses:
            record.uses = item.uses
            self.used(item, record)

    def discard(self, item: Item, evicted: bool) -> None:
        """Remove ``item`` from its queue. Its record keeps the place. O(log n)."""
        record: Record = item.memo
        record.queue.remove(record.ticket)
        self.gone(item, record, evicted)

    def on_ghost_hit(self, item: Item) -> None:
        """Store the record of a ghost until its return. Ghosts without a memo are ignored."""
        if item.memo is not None:
            self._asked_back[item.position] = (item.memo, self._now)

    def _returned(self, item: Item) -> Record | None:
        """Return the ghost's record if ``item`` is a returned ghost.

        Items from another priority class do not count as returned.
        """
        if item.memo is not None:
            return None
        ghost, when = self._asked_back.pop(item.position, (None, 0))
        return ghost if item.created - when <= RETURN_WITHIN else None

    def _ticket(self) -> int:
        self._next_ticket += 1
        return self._next_ticket


class BothKinds(EvictionPolicy):
    """Policy with one instance for KV and one for checkpoints.

    With a shared budget, the less recently used of both victims is evicted.
    """

    orders_classes = False

    queues: ClassVar[Callable[[], QueuePolicy]]
    """Factory of both instances."""

    def __init__(self) -> None:
        make = type(self).queues
        self._policies: dict[Kind, QueuePolicy] = {"kv": make(), "checkpoint": make()}

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


# --- Policies with one or two queues --------------------------------------------------------------


class ClockQueue(QueuePolicy):
    """Ring of items with one reference bit each."""

    def __init__(self) -> None:
        super().__init__()
        self.ring = Queue()

    def enter(self, item: Item, ghost: Record | None) -> Queue:
        """Enter behind the hand."""
        return self.ring

    def choose(self) -> Item | None:
        """Return the first item without its bit. The hand clears the bits that it passes."""
        while (oldest := self.ring.oldest()) is not None and oldest.memo.mark:
            oldest.memo.mark = 0
            self.move(oldest, self.ring)
        return oldest


class Clock(BothKinds):
    """Evict the first item in the ring that was not used since the hand's last round.

    Source: Corbató, "A paging experiment with the Multics system", 1968.
    Candidates: leaf KV, any unlocked checkpoint. Refresh: sets a bit.
    Two kinds: one ring for each. Sizes are ignored.
    """

    queues = ClockQueue


class SieveQueue(QueuePolicy):
    """Queue in order of arrival with reference bits and a hand. Items never change their place."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = Queue()
        self.hand = 0
        """Ticket at which the next search starts, or 0 for the oldest item."""
        self._chosen: Item | None = None

    def enter(self, item: Item, ghost: Record | None) -> Queue:
        """Enter at the young end."""
        return self.queue

    def choose(self) -> Item | None:
        """Return the first unused item from the hand on. The hand clears bits it passes."""
        if not len(self.queue):
            return None
        while True:
            item = self.queue.after(self.hand)
            record: Record = item.memo
            if not record.mark:
                self.hand = record.ticket
                self._chosen = item
                return item
            record.mark = 0
            self.hand = record.ticket + 1

    def gone(self, item: Item, record: Record, evicted: bool) -> None:
        """Advance the hand to the next younger item. After the youngest it starts again."""
        if item is self._chosen:
            self._chosen = None
            self.hand = self.queue.after(record.ticket).memo.ticket if len(self.queue) else 0


class Sieve(BothKinds):
    """Evict as CLOCK does, but leave survivors in place, so that new items are removed early.

    Source: Zhang et al., "SIEVE is simpler than LRU" (NSDI'24).
    Candidates: leaf KV, any unlocked checkpoint. Refresh: sets a bit.
    Two kinds: one queue and one hand for each. Sizes are ignored.
    """

    queues = SieveQueue
