"""S3-FIFO."""

from __future__ import annotations

from hybridcache.policies.eviction.queues import (
    BothKinds,
    Queue,
    QueuePolicy,
    Record,
)
from hybridcache.policies.protocol import Item


class S3FifoQueues(QueuePolicy):
    """A small FIFO (``share`` of the bytes) and a main one; counters to 3."""

    def __init__(self, share: float = 0.1) -> None:
        super().__init__()
        self.share = share
        self.small, self.main = Queue(), Queue()

    def enter(self, item: Item, ghost: Record | None) -> Queue:
        """``small``; ``main`` for what left ``small`` a while ago and is asked back. What left
        ``main`` is no ghost."""
        if ghost is None or not isinstance(ghost.owner, S3FifoQueues):
            return self.small
        return self.main if ghost.queue is ghost.owner.small else self.small

    def used(self, item: Item, record: Record) -> None:
        """Counts to 3; nothing moves."""
        record.mark = min(record.mark + 1, 3)

    def choose(self) -> Item | None:
        """From ``small`` while that has its share or more, else from ``main``."""
        while True:
            total = self.small.num_bytes + self.main.num_bytes
            if len(self.small) and (
                self.small.num_bytes >= self.share * total or not len(self.main)
            ):
                item = self._lazily_promoted()
            else:
                item = self._reinserted()
            if item is not None or not (len(self.small) or len(self.main)):
                return item

    def _lazily_promoted(self) -> Item | None:
        """The small queue's oldest, unless it was used more than once: then it goes to main."""
        oldest = self.small.oldest()
        assert oldest is not None
        record: Record = oldest[1].memo
        if record.mark <= 1:
            return oldest[1]
        record.mark = 0
        self.move(oldest[1], self.main)
        return None

    def _reinserted(self) -> Item | None:
        """The main queue's oldest, unless its counter buys it another round."""
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
    """Most items leave through a small FIFO; what is used twice there, or comes back as a ghost,
    lives in the main one.

    Source: Yang et al., "FIFO queues are all you need for cache eviction" (SOSP'23). Candidates:
    leaf KV, any unlocked checkpoint. Refresh: a counter. Two kinds: the queues for each, shares in
    bytes; the tree's ghosts are its ghost queue (checkpoints only).
    """

    def __init__(self) -> None:
        super().__init__(S3FifoQueues(), S3FifoQueues())
