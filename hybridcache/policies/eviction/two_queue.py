"""2Q replacement."""

from __future__ import annotations

from hybridcache.policies.eviction.queues import (
    BothKinds,
    Queue,
    QueuePolicy,
    Record,
)
from hybridcache.policies.protocol import Item


class TwoQueueQueues(QueuePolicy):
    """Queues ``recent`` (A1in, FIFO, at most ``share`` of the bytes) and ``frequent`` (Am, LRU)."""

    def __init__(self, share: float = 0.25) -> None:
        super().__init__()
        self.share = share
        self.recent, self.frequent = Queue(), Queue()

    def enter(self, item: Item, ghost: Record | None) -> Queue:
        """Enter ``recent``, or ``frequent`` if a ghost of ``recent`` returns.

        Items evicted from ``frequent`` count as new.
        """
        if ghost is None or not isinstance(ghost.owner, TwoQueueQueues):
            return self.recent
        return self.frequent if ghost.queue is ghost.owner.recent else self.recent

    def used(self, item: Item, record: Record) -> None:
        """Move within ``frequent``. Uses in ``recent``, shortly after the first, are ignored."""
        if record.queue is self.frequent:
            self.move(item, self.frequent)

    def choose(self) -> Item | None:
        """Return the oldest of ``recent`` if it exceeds its share, else of ``frequent``."""
        total = self.recent.num_bytes + self.frequent.num_bytes
        first, second = self.recent, self.frequent
        if first.num_bytes <= self.share * total:
            first, second = second, first
        oldest = first.oldest() or second.oldest()
        return oldest[1] if oldest else None


class TwoQueue(BothKinds):
    """Evict from a short FIFO of new items, or from an LRU list of items that returned as ghosts.

    Source: Johnson, Shasha, "2Q: a low overhead high performance buffer management replacement
    algorithm" (VLDB'94).
    Candidates: leaf KV, any unlocked checkpoint. Refresh: only in the frequent queue.
    Two kinds: two queues for each, with shares in bytes. The tree's ghosts are A1out. KV has no
    ghost hits, so its frequent queue stays empty and it is a FIFO.
    """

    def __init__(self) -> None:
        super().__init__(TwoQueueQueues(), TwoQueueQueues())
