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
    """A probation queue and a protected one of at most ``protected`` of the bytes."""

    def __init__(self, protected: float) -> None:
        super().__init__()
        self.share = protected
        self.probation, self.protected = Queue(), Queue()

    def enter(self, item: Item, ghost: Record | None) -> Queue:
        """Probation."""
        return self.probation

    def used(self, item: Item, record: Record) -> None:
        """To the young end of protection, whose overflow returns to that of probation."""
        self.move(item, self.protected)
        total = self.probation.num_bytes + self.protected.num_bytes
        while self.protected.num_bytes > self.share * total and len(self.protected) > 1:
            oldest = self.protected.oldest()
            assert oldest is not None
            self.move(oldest[1], self.probation)

    def choose(self) -> Item | None:
        """The oldest on probation; of the protected where none is."""
        oldest = self.probation.oldest() or self.protected.oldest()
        return oldest[1] if oldest else None


class SLRU(BothKinds):
    """New items on probation; a used one is protected; protection overflows back to probation;
    probation loses its oldest.

    Source: Karedla, Love, Wherry, "Caching strategies to improve disk system performance", 1994.
    Candidates: leaf KV, any unlocked checkpoint. Refresh: the consumed checkpoint, the path's KV
    nodes. Two kinds: two queues for each, shares in bytes.
    """

    def __init__(self, protected: float = 0.8) -> None:
        make = partial(SLRUQueues, protected)
        super().__init__(make(), make())
