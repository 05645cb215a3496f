"""Policies made of FIFO queues, and their base classes. Each has one instance per kind of item."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from sortedcontainers import SortedDict

from hybridcache.policies.protocol import EvictionPolicy, Item, Kind

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
class Record:
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
        self._now = max(self._now, item.last_used)
        record: Record | None = item.memo
        if record is None or record.owner is not self:
            queue = self.enter(item, self._returned(item))
            item.memo = record = Record(self, queue, self._ticket(), item.uses)
        record.queue.put(record.ticket, item)
        self.touch(item)

    def touch(self, item: Item) -> None:
        self._now = max(self._now, item.last_used)
        record: Record = item.memo
        if item.uses > record.uses:
            record.uses = item.uses
            self.used(item, record)

    def discard(self, item: Item, evicted: bool) -> None:
        record: Record = item.memo
        record.queue.remove(record.ticket)
        self.gone(item, record, evicted)

    def on_ghost_hit(self, item: Item) -> None:
        if item.memo is not None:
            self._asked_back[item.position] = (item.memo, self._now)

    def _returned(self, item: Item) -> Record | None:
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


class _OneQueue(QueuePolicy):
    """Base of the policies with one queue."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = Queue()

    def enter(self, item: Item, ghost: Record | None) -> Queue:
        return self.queue


class Clock(_OneQueue):
    """Evict the first item in the ring that was not used since the hand's last round.

    Source: Corbató, "A paging experiment with the Multics system", 1968.
    Two kinds: one ring for each. Sizes are ignored.
    """

    def choose(self) -> Item | None:
        """Return the first item without its bit. The hand clears the bits that it passes."""
        while (oldest := self.queue.oldest()) is not None and oldest.memo.mark:
            oldest.memo.mark = 0
            self.move(oldest, self.queue)
        return oldest


class Sieve(_OneQueue):
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


SMALL_SHARE = 0.1
"""Part of the bytes that the small FIFO may hold."""


class S3Fifo(QueuePolicy):
    """Evict most items from a small FIFO. Items used twice or returned as ghosts go to a main FIFO.

    Source: Yang et al., "FIFO queues are all you need for cache eviction" (SOSP'23).
    Two kinds: separate queues, with shares in bytes. The tree's ghosts (checkpoints only) are the
    ghost queue.
    """

    def __init__(self) -> None:
        super().__init__()
        self.small, self.main = Queue(), Queue()

    def enter(self, item: Item, ghost: Record | None) -> Queue:
        """Enter ``small``, or ``main`` if a ghost of ``small`` returns."""
        if ghost is None or not isinstance(ghost.owner, type(self)):
            return self.small
        return self.main if ghost.queue is ghost.owner.small else self.small

    def used(self, item: Item, record: Record) -> None:
        """Increment the counter, up to 3. The item does not move."""
        record.mark = min(record.mark + 1, 3)

    def choose(self) -> Item | None:
        """Return the oldest of ``small`` if that has its share or more, else of ``main``. If it was
        used, in ``small`` more than once, it moves to ``main`` instead."""
        while True:
            total = self.small.num_bytes + self.main.num_bytes
            is_full = self.small.num_bytes >= SMALL_SHARE * total
            from_small = len(self.small) > 0 and (is_full or not len(self.main))
            item = (self.small if from_small else self.main).oldest()
            if item is None or item.memo.mark <= (1 if from_small else 0):
                return item
            record = item.memo
            record.mark = 0 if from_small else record.mark - 1
            self.move(item, self.main)


class ARC(QueuePolicy):
    """Evict from one of two LRU lists, used once and used again. Ghost hits adapt their sizes.

    Source: Megiddo, Modha, "ARC: a self-tuning, low overhead replacement cache" (FAST'03).
    Two kinds: two lists for each, with the target in bytes. The tree's ghosts are B1 and B2. They
    exist for checkpoints only, so KV's target stays 0 and its used items are kept longest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recent, self.frequent = Queue(), Queue()
        self.target_bytes = 0.0
        self.num_ghosts = {True: 0, False: 0}
        """Evicted and not returned items, by origin: True for ``recent``."""
        self._chosen: Item | None = None
        self._frequent_asked = False
        """True if the latest ghost hit was of ``frequent``. T1 then also shrinks at its target."""

    def enter(self, item: Item, ghost: Record | None) -> Queue:
        """Enter ``recent``, or ``frequent`` if a ghost returns."""
        self._frequent_asked = False
        return self.recent if ghost is None else self.frequent

    def used(self, item: Item, record: Record) -> None:
        """Move to the young end of ``frequent``, from either list."""
        self.move(item, self.frequent)

    def choose(self) -> Item | None:
        """Return the oldest of ``recent`` above its target, else of ``frequent`` (REPLACE)."""
        held = self.recent.num_bytes
        over = held > self.target_bytes or (self._frequent_asked and held == self.target_bytes)
        first, second = (self.recent, self.frequent) if over else (self.frequent, self.recent)
        self._chosen = first.oldest() or second.oldest()
        return self._chosen

    def gone(self, item: Item, record: Record, evicted: bool) -> None:
        """Count the chosen victim as a ghost, unless it was only locked."""
        if item is not self._chosen:
            return
        self._chosen = None
        if evicted:
            self.num_ghosts[record.queue is self.recent] += 1

    def on_ghost_hit(self, item: Item) -> None:
        """Enlarge the list of the ghost by the item's bytes times the ratio of ghost counts."""
        super().on_ghost_hit(item)
        record: Record | None = item.memo
        if record is None or record.owner is not self:
            return
        from_recent = record.queue is self.recent
        self._frequent_asked = not from_recent
        own, other = self._remembered(from_recent), self._remembered(not from_recent)
        step = max(1.0, other / own) * item.size_bytes
        total = self.recent.num_bytes + self.frequent.num_bytes
        self.target_bytes += step if from_recent else -step
        self.target_bytes = min(max(self.target_bytes, 0.0), float(total))
        self.num_ghosts[from_recent] = max(0, self.num_ghosts[from_recent] - 1)

    def _remembered(self, from_recent: bool) -> int:
        """Return |B1| or |B2|, at least 1. T1 with B1, and B1 with B2, may not exceed the size of
        the cache."""
        recent = min(self.num_ghosts[True], len(self.frequent))
        if from_recent:
            return max(1, recent)
        capacity = len(self.recent) + len(self.frequent)
        return max(1, min(self.num_ghosts[False], capacity - recent))


AGE_AFTER = 10
"""Uses per candidate after which all counters are halved."""
WINDOW, PROTECTED = 0.01, 0.8
"""Parts of the bytes: of the window in all, and of the protected queue in main."""


class WTinyLFU(QueuePolicy):
    """Admit an item from the window to main only if it is used more often than the item it evicts.

    Source: Einziger, Friedman, Manes, "TinyLFU: a highly efficient cache admission policy" (TOS
    2017).
    Two kinds: separate queues, with shares in bytes. Main has room for 99 % of the bytes held at
    the previous eviction. Counters are exact, while the paper uses a sketch. They outlive eviction
    for checkpoints only, because only these have ghost hits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.window, self.probation, self.protected = Queue(), Queue(), Queue()
        self._uses = 0
        self._full_bytes: int | None = None
        """Bytes held at the previous eviction: an estimate of the capacity."""
        self._duel: tuple[Item, Item] | None = None
        """(incumbent to evict, newcomer that takes its place in main)."""

    def enter(self, item: Item, ghost: Record | None) -> Queue:
        return self.window

    def add(self, item: Item) -> None:
        """Add an item. A returning item continues its ghost's counter."""
        ghost = self._returned(item)
        super().add(item)
        if ghost is not None:
            item.memo.mark = ghost.mark + 1

    def used(self, item: Item, record: Record) -> None:
        """Count a use, and move the item in the window or to the protected queue, whose overflow
        returns to probation."""
        record.mark += 1
        self._uses += 1
        self.move(item, self.window if record.queue is self.window else self.protected)
        share = PROTECTED * self._main_bytes()
        while self.protected.num_bytes > share and len(self.protected) > 1:
            oldest = self.protected.oldest()
            assert oldest is not None
            self.move(oldest, self.probation)
        queues = self.window, self.probation, self.protected
        if self._uses > AGE_AFTER * sum(map(len, queues)):
            self._uses = 0
            for queue in queues:
                for held, _ in queue.entries.values():
                    held.memo.mark //= 2

    def choose(self) -> Item | None:
        """Move the window's overflow to main while there is room, then compare it with main's
        oldest item. Returns the less frequent one."""
        total = self.window.num_bytes + self._main_bytes()
        full = total if self._full_bytes is None else self._full_bytes
        self._full_bytes = total
        room = (1 - WINDOW) * full
        while (newcomer := self.window.oldest()) is not None:
            # The victim makes room for an item that enters the window: count one more of this size.
            if self.window.num_bytes + newcomer.size_bytes <= WINDOW * total:
                break
            if self._main_bytes() + newcomer.size_bytes <= room:
                self.move(newcomer, self.probation)
                continue
            incumbent = self._main_oldest()
            if incumbent is None or newcomer.memo.mark <= incumbent.memo.mark:
                return newcomer
            self._duel = (incumbent, newcomer)
            return incumbent
        return self._main_oldest() or newcomer

    def gone(self, item: Item, record: Record, evicted: bool) -> None:
        """Move a newcomer that won its comparison to the place of the evicted item."""
        if self._duel is None:
            return
        loser, winner = self._duel
        if item is loser and evicted:
            self.move(winner, self.probation)
        if item is loser or item is winner:
            self._duel = None

    def _main_bytes(self) -> int:
        return self.probation.num_bytes + self.protected.num_bytes

    def _main_oldest(self) -> Item | None:
        return self.probation.oldest() or self.protected.oldest()
