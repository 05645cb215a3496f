"""SIEVE replacement."""

from __future__ import annotations

from hybridcache.policies.eviction.queues import (
    BothKinds,
    Queue,
    QueuePolicy,
    Record,
)
from hybridcache.policies.protocol import Item


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

    def used(self, item: Item, record: Record) -> None:
        """Set the reference bit."""
        record.mark = 1

    def choose(self) -> Item | None:
        """Return the first unused item from the hand on. The hand clears bits it passes."""
        if not len(self.queue):
            return None
        while True:
            ticket, item = self.queue.after(self.hand)
            record: Record = item.memo
            if not record.mark:
                self.hand = ticket
                self._chosen = item
                return item
            record.mark = 0
            self.hand = ticket + 1

    def gone(self, item: Item, record: Record, evicted: bool) -> None:
        """Advance the hand to the next younger item. After the youngest it starts again."""
        if item is self._chosen:
            self._chosen = None
            self.hand = self.queue.after(record.ticket)[0] if len(self.queue) else 0


class Sieve(BothKinds):
    """Evict as CLOCK does, but leave survivors in place, so that new items are removed early.

    Source: Zhang et al., "SIEVE is simpler than LRU" (NSDI'24).
    Candidates: leaf KV, any unlocked checkpoint. Refresh: sets a bit.
    Two kinds: one queue and one hand for each. Sizes are ignored.
    """

    def __init__(self) -> None:
        super().__init__(SieveQueue(), SieveQueue())
