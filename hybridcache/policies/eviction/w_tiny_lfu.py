"""W-TinyLFU."""

from __future__ import annotations

from hybridcache.policies.eviction.queues import (
    BothKinds,
    Queue,
    QueuePolicy,
    Record,
)
from hybridcache.policies.protocol import Item

AGE_AFTER = 10
"""Counters are halved after this many uses per candidate."""


class TinyLfuQueues(QueuePolicy):
    """A window LRU of ``window`` of the bytes before a segmented main queue that only the more
    frequent may enter.

    Counters are exact (one per item, in its record; a ghost's passes to the item that came back),
    where the paper sketches them.
    """

    def __init__(self, window: float = 0.01, protected: float = 0.8) -> None:
        super().__init__()
        self.window_share, self.protected_share = window, protected
        self.window, self.probation, self.protected = Queue(), Queue(), Queue()
        self._uses = 0
        self._full_bytes: int | None = None
        """What was held when a victim was last asked for: how much there is room for."""
        self._duel: tuple[Item, Item] | None = None
        """(incumbent chosen to go, newcomer that takes its place in main)."""

    def enter(self, item: Item, ghost: Record | None) -> Queue:
        """The window, whatever is known of it."""
        return self.window

    def add(self, item: Item) -> None:
        """A returning item goes on counting where its ghost stopped, this request included."""
        ghost = self._returned(item)
        super().add(item)
        if ghost is not None:
            item.memo.mark = ghost.mark + 1

    def used(self, item: Item, record: Record) -> None:
        """Counts, and moves to the young end of the window, or into the protected queue, whose
        overflow leaves it."""
        record.mark += 1
        self._uses += 1
        self.move(item, self.window if record.queue is self.window else self.protected)
        share = self.protected_share * self._main_bytes()
        while self.protected.num_bytes > share and len(self.protected) > 1:
            oldest = self.protected.oldest()
            assert oldest is not None
            self.move(oldest[1], self.probation)
        if self._uses > AGE_AFTER * (len(self.window) + len(self.probation) + len(self.protected)):
            self._age()

    def choose(self) -> Item | None:
        """The window's overflow fills main while that has room, then duels with main's oldest: the
        less frequent one goes."""
        total = self.window.num_bytes + self._main_bytes()
        full = total if self._full_bytes is None else self._full_bytes
        self._full_bytes = total
        room = (1 - self.window_share) * full
        while (overflow := self.window.oldest()) is not None:
            newcomer = overflow[1]
            # The victim makes room for an item that enters the window: count one more of this size.
            if self.window.num_bytes + newcomer.size_bytes <= self.window_share * total:
                break
            if self._main_bytes() + newcomer.size_bytes <= room:
                self.move(newcomer, self.probation)
                continue
            incumbent = self._main_oldest()
            if incumbent is None or newcomer.memo.mark <= incumbent.memo.mark:
                return newcomer
            self._duel = (incumbent, newcomer)
            return incumbent
        return self._main_oldest() or (overflow[1] if overflow else None)

    def gone(self, item: Item, record: Record, evicted: bool) -> None:
        """A newcomer that won its duel takes the loser's place, if that is left free."""
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
        oldest = self.probation.oldest() or self.protected.oldest()
        return oldest[1] if oldest else None

    def _age(self) -> None:
        self._uses = 0
        for queue in (self.window, self.probation, self.protected):
            for _, item in queue:
                item.memo.mark //= 2


class WTinyLFU(BothKinds):
    """A newcomer leaves the window for the main cache only if it was used more often than what it
    would displace.

    Source: Einziger, Friedman, Manes, "TinyLFU: a highly efficient cache admission policy" (TOS
    2017). Candidates: leaf KV, any unlocked checkpoint. Refresh: the consumed checkpoint, the
    path's KV nodes. Two kinds: the queues for each, shares in bytes; main has room for 99 % of what
    was held when a victim was last asked for. Frequency outlives eviction for checkpoints only,
    whose ghosts speak.
    """

    def __init__(self) -> None:
        super().__init__(TinyLfuQueues(), TinyLfuQueues())
