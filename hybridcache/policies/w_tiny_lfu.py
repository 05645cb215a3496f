"""W-TinyLFU."""

from __future__ import annotations

from hybridcache.policies.protocol import Item
from hybridcache.policies.queues import BothKinds, Queue, QueuePolicy, Record

AGE_AFTER = 10
"""Counters are halved after this many uses per candidate."""


class TinyLfuQueues(QueuePolicy):
    """A window LRU of ``window`` of the bytes before a segmented main queue that only the more frequent may enter.

    Counters are exact (one per item, in its record), where the paper sketches them.
    """

    def __init__(self, window: float = 0.01, protected: float = 0.8) -> None:
        super().__init__()
        self.window_share, self.protected_share = window, protected
        self.window, self.probation, self.protected = Queue(), Queue(), Queue()
        self._uses = 0

    def enter(self, item: Item, returning: bool) -> Queue:
        return self.window

    def used(self, item: Item, record: Record) -> None:
        record.mark += 1
        self._uses += 1
        self.move(item, self.window if record.queue is self.window else self.protected)
        main = self.probation.num_bytes + self.protected.num_bytes
        while self.protected.num_bytes > self.protected_share * main and len(self.protected) > 1:
            oldest = self.protected.oldest()
            assert oldest is not None
            self.move(oldest[1], self.probation)
        if self._uses > AGE_AFTER * (len(self.window) + len(self.probation) + len(self.protected)):
            self._age()

    def choose(self) -> Item | None:
        """The window's overflow against main's oldest: the less frequent one goes."""
        while (newcomer := self.window.oldest()) is not None:
            main = self.probation.num_bytes + self.protected.num_bytes
            incumbent = self.probation.oldest() or self.protected.oldest()
            if incumbent is None:
                return newcomer[1]
            if self.window.num_bytes <= self.window_share * (self.window.num_bytes + main):
                return incumbent[1]
            if newcomer[1].memo.mark <= incumbent[1].memo.mark:
                return newcomer[1]
            self.move(newcomer[1], self.probation)
            return incumbent[1]
        oldest = self.probation.oldest() or self.protected.oldest()
        return oldest[1] if oldest else None

    def _age(self) -> None:
        self._uses = 0
        for queue in (self.window, self.probation, self.protected):
            for _, item in queue:
                item.memo.mark //= 2


class WTinyLFU(BothKinds):
    """A newcomer leaves the window for the main cache only if it was used more often than what it would displace.

    Source: Einziger, Friedman, Manes, "TinyLFU: a highly efficient cache admission policy" (TOS 2017). Candidates: leaf KV,
    any unlocked checkpoint. Refresh: the consumed checkpoint, the path's KV nodes. Two kinds: the queues for each, shares in
    bytes. While nothing was evicted yet everything waits in the window; the first victims sort it.
    """

    def __init__(self) -> None:
        super().__init__(TinyLfuQueues(), TinyLfuQueues())
