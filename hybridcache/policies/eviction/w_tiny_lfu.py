"""W-TinyLFU."""

from __future__ import annotations

from hybridcache.policies.eviction.queues import BothKinds, Queue, QueuePolicy, Record
from hybridcache.policies.protocol import Item

AGE_AFTER = 10
"""Uses per candidate after which all counters are halved."""
WINDOW, PROTECTED = 0.01, 0.8
"""Parts of the bytes: of the window in all, and of the protected queue in main."""


class TinyLfuQueues(QueuePolicy):
    """Window LRU of ``WINDOW`` of the bytes, before a segmented main queue with an admission test.

    Counters are exact, while the paper uses a sketch. Each item has one in its record, and a
    returning item inherits its ghost's counter.
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
        """Enter the window."""
        return self.window

    def add(self, item: Item) -> None:
        """Add an item. A returning item continues its ghost's counter."""
        ghost = self._returned(item)
        super().add(item)
        if ghost is not None:
            item.memo.mark = ghost.mark + 1

    def used(self, item: Item, record: Record) -> None:
        """Count a use, and move the item in the window or to the protected queue.

        Overflow of the protected queue returns to probation.
        """
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
                for held in queue:
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


class WTinyLFU(BothKinds):
    """Admit an item from the window to main only if it is used more often than the item it evicts.

    Source: Einziger, Friedman, Manes, "TinyLFU: a highly efficient cache admission policy" (TOS
    2017).
    Candidates: leaf KV, any unlocked checkpoint. Refresh: the resumed checkpoint, the path's KV.
    Two kinds: separate queues, with shares in bytes. Main has room for 99 % of the bytes held at
    the previous eviction. Frequency outlives eviction for checkpoints only, because only they have
    ghost hits.
    """

    queues = TinyLfuQueues
