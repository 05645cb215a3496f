"""SIEVE."""

from __future__ import annotations

from hybridcache.policies.eviction.queues import (
    BothKinds,
    Queue,
    QueuePolicy,
    Record,
)
from hybridcache.policies.protocol import Item


class SieveQueue(QueuePolicy):
    """One queue in order of arrival that nothing ever leaves its place in, and a hand."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = Queue()
        self.hand = 0
        """Ticket to look at first; 0: the oldest."""
        self._chosen: Item | None = None

    def enter(self, item: Item, ghost: Record | None) -> Queue:
        """The young end."""
        return self.queue

    def used(self, item: Item, record: Record) -> None:
        """Sets its bit."""
        record.mark = 1

    def choose(self) -> Item | None:
        """The first from the hand on that was not used; those it passes lose their bit."""
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
        """The hand goes on to the next younger one there is now; behind the youngest it starts
        over."""
        if item is self._chosen:
            self._chosen = None
            self.hand = self.queue.after(record.ticket)[0] if len(self.queue) else 0


class Sieve(BothKinds):
    """As CLOCK, but survivors stay where they are: newcomers are sifted out early.

    Source: Zhang et al., "SIEVE is simpler than LRU" (NSDI'24). Candidates: leaf KV, any unlocked
    checkpoint. Refresh: a bit. Two kinds: a queue and a hand for each; sizes ignored.
    """

    def __init__(self) -> None:
        super().__init__(SieveQueue(), SieveQueue())
