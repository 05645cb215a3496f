"""CLOCK."""

from __future__ import annotations

from hybridcache.policies.eviction.queues import (
    BothKinds,
    Queue,
    QueuePolicy,
    Record,
)
from hybridcache.policies.protocol import Item


class ClockQueue(QueuePolicy):
    """Ring of items with one reference bit each."""

    def __init__(self) -> None:
        super().__init__()
        self.ring = Queue()

    def enter(self, item: Item, ghost: Record | None) -> Queue:
        """Enter behind the hand."""
        return self.ring

    def used(self, item: Item, record: Record) -> None:
        """Set the reference bit."""
        record.mark = 1

    def choose(self) -> Item | None:
        """Return the first item without its bit. The hand clears the bits that it passes."""
        while (oldest := self.ring.oldest()) is not None:
            record: Record = oldest[1].memo
            if not record.mark:
                return oldest[1]
            record.mark = 0
            self.move(oldest[1], self.ring)
        return None


class Clock(BothKinds):
    """Evict the first item in the ring that was not used since the hand's last round.

    Source: Corbató, "A paging experiment with the Multics system", 1968.
    Candidates: leaf KV, any unlocked checkpoint. Refresh: sets a bit.
    Two kinds: one ring for each. Sizes are ignored.
    """

    def __init__(self) -> None:
        super().__init__(ClockQueue(), ClockQueue())
