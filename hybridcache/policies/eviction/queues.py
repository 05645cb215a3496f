"""What the queue policies share: queues whose places survive a lock, and one policy instance per
kind of item."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Iterator

from hybridcache.policies.protocol import EvictionPolicy, Item, Kind

RETURN_WITHIN = 16
"""Requests after a ghost spoke within which a new checkpoint at its position is taken for the one
that came back."""


class Queue:
    """Candidates in order of their tickets, oldest first.

    A ticket is drawn when an item is pushed; an item that is locked and comes back is restored to
    its old place. O(log n) comparisons, and a move of at most n machine words.
    """

    def __init__(self) -> None:
        self._tickets: list[int] = []
        self._items: dict[int, Item] = {}
        self.num_bytes = 0
        """Bytes its candidates weighed when they entered."""
        self._sizes: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[tuple[int, Item]]:
        return ((ticket, self._items[ticket]) for ticket in self._tickets)

    def put(self, ticket: int, item: Item) -> None:
        """Add ``item`` in the place of ``ticket``, new or its old one."""
        insort(self._tickets, ticket)
        self._items[ticket] = item
        self._sizes[ticket] = item.size_bytes
        self.num_bytes += item.size_bytes

    def remove(self, ticket: int) -> None:
        """Take out the item of ``ticket``. KeyError where it has none."""
        del self._tickets[bisect_left(self._tickets, ticket)]
        del self._items[ticket]
        self.num_bytes -= self._sizes.pop(ticket)

    def oldest(self) -> tuple[int, Item] | None:
        """(ticket, item) at the old end; None: empty. O(1)."""
        return (self._tickets[0], self._items[self._tickets[0]]) if self._tickets else None

    def after(self, ticket: int) -> tuple[int, Item]:
        """The first at or after ``ticket``, going round. The queue must not be empty."""
        place = bisect_left(self._tickets, ticket)
        found = self._tickets[place if place < len(self._tickets) else 0]
        return found, self._items[found]


class Record:
    """What a queue policy remembers of an item, also while it is locked: its queue, its place, and
    how often it was used."""

    __slots__ = ("mark", "owner", "queue", "ticket", "uses")

    def __init__(self, owner: QueuePolicy, queue: Queue, ticket: int, uses: int) -> None:
        self.owner = owner
        """The instance it is a candidate of: a change of tier moves an item to another."""
        self.queue = queue
        self.ticket = ticket
        self.uses = uses
        self.mark = 0


class QueuePolicy(ABC):
    """Base of the queue policies: a subclass says where a new item goes (``enter``), what a use
    does (``used``), and which candidate a *kind* should lose (``choose``).

    Carried over to two kinds and unequal sizes: one instance of everything per kind
    (``BothKinds``), shares of the memory counted in bytes of what is held now. A use while the item
    was locked is noticed when it comes back. An item that changes its tier (``policies.tiers``)
    enters the other tier's instance as a new one. Ghosts tell a position, not a path: the next new
    checkpoint there, at most 16 requests later, is taken for the one that came back.
    """

    def __init__(self) -> None:
        self._next_ticket = 0
        self._now = 0
        """Logical time of the newest item or use seen."""
        self._asked_back: dict[int, tuple[Record, int]] = {}
        """Position of a ghost that spoke -> (its record, when)."""

    @abstractmethod
    def enter(self, item: Item, ghost: Record | None) -> Queue:
        """The queue a new item goes to; ``ghost``: what was remembered of it, where it was asked
        back a moment ago."""

    @abstractmethod
    def used(self, item: Item, record: Record) -> None:
        """A candidate was used since we last looked."""

    @abstractmethod
    def choose(self) -> Item | None:
        """The candidate to lose, still in its queue."""

    def gone(self, item: Item, record: Record, evicted: bool) -> None:  # noqa: B027
        """A candidate left its queue; not ``evicted``: it may come back."""

    def move(self, item: Item, queue: Queue) -> None:
        """To the young end of ``queue``."""
        record: Record = item.memo
        record.queue.remove(record.ticket)
        record.queue, record.ticket = queue, self._ticket()
        queue.put(record.ticket, item)

    def add(self, item: Item) -> None:
        """A new item enters; one that was locked comes back to its place. O(log n)."""
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
        """``used`` is called where ``uses`` has grown, once however much."""
        self._now = max(self._now, item.last_used)
        record: Record = item.memo
        if item.uses > record.uses:
            record.uses = item.uses
            self.used(item, record)

    def discard(self, item: Item, evicted: bool) -> None:
        """Out of its queue; its record keeps the place. O(log n)."""
        record: Record = item.memo
        record.queue.remove(record.ticket)
        self.gone(item, record, evicted)

    def missed(self, item: Item) -> None:
        """A ghost hit: remembers what it was, for when it comes back; one without a memo is
        none."""
        if item.memo is not None:
            self._asked_back[item.position] = (item.memo, self._now)

    def _returned(self, item: Item) -> Record | None:
        """The record of the ghost that ``item`` is the return of. An item from another tier is no
        return."""
        if item.memo is not None:
            return None
        ghost, when = self._asked_back.pop(item.position, (None, 0))
        return ghost if item.created - when <= RETURN_WITHIN else None

    def _ticket(self) -> int:
        self._next_ticket += 1
        return self._next_ticket


class BothKinds(EvictionPolicy):
    """One instance of a queue policy for KV and one for checkpoints; where one byte is asked of
    either, the victim that was used longer ago."""

    orders_tiers = False

    def __init__(self, kv: QueuePolicy, checkpoint: QueuePolicy) -> None:
        self._policies: dict[Kind, QueuePolicy] = {"kv": kv, "checkpoint": checkpoint}

    def add(self, item: Item) -> None:
        self._policies[item.kind].add(item)

    def touch(self, item: Item) -> None:
        self._policies[item.kind].touch(item)

    def discard(self, item: Item, evicted: bool) -> None:
        self._policies[item.kind].discard(item, evicted)

    def missed(self, item: Item) -> None:
        self._policies[item.kind].missed(item)

    def victim(self, kind: Kind | None) -> Item | None:
        if kind is not None:
            return self._policies[kind].choose()
        kv, checkpoint = self._policies["kv"].choose(), self._policies["checkpoint"].choose()
        if kv is None or checkpoint is None:
            return kv or checkpoint
        return min(kv, checkpoint, key=lambda item: (item.last_used, item.serial))
