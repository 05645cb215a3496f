"""S3-FIFO replacement."""

from __future__ import annotations

from hybridcache.policies.eviction.queues import BothKinds, Queue, QueuePolicy, Record
from hybridcache.policies.protocol import Item

SHARE = 0.1
"""Part of the bytes that the small FIFO may hold."""


class S3FifoQueues(QueuePolicy):
    """Small FIFO (``SHARE`` of the bytes) and main FIFO, with counters up to 3."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.main = Queue(), Queue()

    def enter(self, item: Item, ghost: Record | None) -> Queue:
        """Enter ``small``, or ``main`` if a ghost of ``small`` returns.

        Items evicted from ``main`` count as new.
        """
        if ghost is None or not isinstance(ghost.owner, S3FifoQueues):
            return self.small
        return self.main if ghost.queue is ghost.owner.small else self.small

    def used(self, item: Item, record: Record) -> None:
        """Increment the counter, up to 3. The item does not move."""
        record.mark = min(record.mark + 1, 3)

    def choose(self) -> Item | None:
        """Return an item from ``small`` if it has its share or more, else from ``main``."""
        while True:
            total = self.small.num_bytes + self.main.num_bytes
            is_full = self.small.num_bytes >= SHARE * total
            if len(self.small) and (is_full or not len(self.main)):
                item = self._lazily_promoted()
            else:
                item = self._reinserted()
            if item is not None or not (len(self.small) or len(self.main)):
                return item

    def _lazily_promoted(self) -> Item | None:
        """Return the oldest item of ``small``, or move it to ``main`` if used more than once."""
        oldest = self.small.oldest()
        assert oldest is not None
        record: Record = oldest[1].memo
        if record.mark <= 1:
            return oldest[1]
        record.mark = 0
        self.move(oldest[1], self.main)
        return None

    def _reinserted(self) -> Item | None:
        """Return the oldest item of ``main``, or reinsert it and decrement its counter."""
        oldest = self.main.oldest()
        if oldest is None:
            return None
        record: Record = oldest[1].memo
        if not record.mark:
            return oldest[1]
        record.mark -= 1
        self.move(oldest[1], self.main)
        return None


class S3Fifo(BothKinds):
    """Evict most items from a small FIFO. Items used twice or returned as ghosts go to a main FIFO.

    Source: Yang et al., "FIFO queues are all you need for cache eviction" (SOSP'23).
    Candidates: leaf KV, any unlocked checkpoint. Refresh: increments a counter.
    Two kinds: separate queues, with shares in bytes. The tree's ghosts (checkpoints only) are the
    ghost queue.
    """

    queues = S3FifoQueues
