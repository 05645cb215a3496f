"""SIEVE."""

from __future__ import annotations

from hybridcache.policies.protocol import Item
from hybridcache.policies.queues import BothKinds, Queue, QueuePolicy, Record


class SieveQueue(QueuePolicy):
    """One queue in order of arrival that nothing ever leaves its place in, and a hand."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = Queue()
        self.hand = 0

    def enter(self, item: Item, returning: bool) -> Queue:
        return self.queue

    def used(self, item: Item, record: Record) -> None:
        record.mark = 1

    def choose(self) -> Item | None:
        if not len(self.queue):
            return None
        while True:
            ticket, item = self.queue.after(self.hand)
            record: Record = item.memo
            if not record.mark:
                self.hand = ticket
                return item
            record.mark = 0
            self.hand = ticket + 1


class Sieve(BothKinds):
    """As CLOCK, but survivors stay where they are: newcomers are sifted out early.

    Source: Zhang et al., "SIEVE is simpler than LRU" (NSDI'24). Candidates: leaf KV, any unlocked checkpoint. Refresh: a
    bit. Two kinds: a queue and a hand for each; sizes ignored.
    """

    def __init__(self) -> None:
        super().__init__(SieveQueue(), SieveQueue())
