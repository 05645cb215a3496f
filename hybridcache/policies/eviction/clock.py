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
    """One ring; a used item gets a second chance."""

    def __init__(self) -> None:
        super().__init__()
        self.ring = Queue()

    def enter(self, item: Item, ghost: Record | None) -> Queue:
        """Behind the hand."""
        return self.ring

    def used(self, item: Item, record: Record) -> None:
        """Sets its bit."""
        record.mark = 1

    def choose(self) -> Item | None:
        """The first whose bit is not set; the bits that the hand passes are cleared."""
        while (oldest := self.ring.oldest()) is not None:
            record: Record = oldest[1].memo
            if not record.mark:
                return oldest[1]
            record.mark = 0
            self.move(oldest[1], self.ring)
        return None


class Clock(BothKinds):
    """The hand passes over items used since its last round (moving them behind it) and takes the
    first that was not.

    Source: Corbató, "A paging experiment with the Multics system", 1968. Candidates: leaf KV, any
    unlocked checkpoint. Refresh: a bit. Two kinds: a ring for each; sizes ignored.
    """

    def __init__(self) -> None:
        super().__init__(ClockQueue(), ClockQueue())
