"""Segmented LRU."""

from __future__ import annotations

from functools import partial

from hybridcache.policies.eviction.queues import (
    BothKinds,
    Queue,
    QueuePolicy,
    Record,
)
from hybridcache.policies.protocol import Item


class SLRUQueues(QueuePolicy):
    """Probation queue, and protected queue of at most ``protected`` of the bytes."""

    def __init__(self, protected: float) -> None:
        super().__init__()
        self.share = protected
        self.probation, self.protected = Queue(), Queue()

    def enter(self, item: Item, ghost: Record | None) -> Queue:
        """Enter the probation queue."""
        return self.probation

    def used(self, item: Item, record: Record) -> None:
        """Move to the young end of the protected queue. Its overflow returns to probation."""
        self.move(item, self.protected)
        total = self.probation.num_bytes + self.protected.num_bytes
        while self.protected.num_bytes > self.share * total and len(self.protected) > 1:
            oldest = self.protected.oldest()
            assert oldest is not None
            self.move(oldest[1], self.probation)

    def choose(self) -> Item | None:
        """Return the oldest item on probation, or the oldest protected one if there is none."""
        oldest = self.probation.oldest() or self.protected.oldest()
        return oldest[1] if oldest else None


class SLRU(BothKinds):
    """Evict the oldest item on probation. A use protects an item; overflow returns to probation.

    Source: Karedla, Love, Wherry, "Caching strategies to improve disk system performance", 1994.
    Candidates: leaf KV, any unlocked checkpoint. Refresh: the resumed checkpoint, the path's KV.
    Two kinds: two queues for each, with shares in bytes.
    """

    def __init__(self, protected: float = 0.8) -> None:
        make = partial(SLRUQueues, protected)
        super().__init__(make(), make())
