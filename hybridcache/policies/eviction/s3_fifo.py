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
        """Return an item from ``small`` if it has its share or more, else from ``main``.

        It is the oldest one. If it was used, in ``small`` more than once, it is moved to ``main``
        instead: lazy promotion and reinsertion.
        """
        while True:
            total = self.small.num_bytes + self.main.num_bytes
            is_full = self.small.num_bytes >= SHARE * total
            from_small = len(self.small) > 0 and (is_full or not len(self.main))
            item = (self.small if from_small else self.main).oldest()
            if item is None or item.memo.mark <= (1 if from_small else 0):
                return item
            record = item.memo
            record.mark = 0 if from_small else record.mark - 1
            self.move(item, self.main)


class S3Fifo(BothKinds):
    """Evict most items from a small FIFO. Items used twice or returned as ghosts go to a main FIFO.

    Source: Yang et al., "FIFO queues are all you need for cache eviction" (SOSP'23).
    Candidates: leaf KV, any unlocked checkpoint. Refresh: increments a counter.
    Two kinds: separate queues, with shares in bytes. The tree's ghosts (checkpoints only) are the
    ghost queue.
    """

    queues = S3FifoQueues
