"""2Q."""

from __future__ import annotations

from hybridcache.policies.eviction.queues import (
    BothKinds,
    Queue,
    QueuePolicy,
    Record,
)
from hybridcache.policies.protocol import Item


class TwoQueueQueues(QueuePolicy):
    """``recent`` (A1in, a FIFO of at most ``share`` of the bytes) and ``frequent`` (Am, an LRU)."""

    def __init__(self, share: float = 0.25) -> None:
        super().__init__()
        self.share = share
        self.recent, self.frequent = Queue(), Queue()

    def enter(self, item: Item, ghost: Record | None) -> Queue:
        """``recent``; ``frequent`` for what left ``recent`` and is asked back. What left
        ``frequent`` is no ghost."""
        if ghost is None or not isinstance(ghost.owner, TwoQueueQueues):
            return self.recent
        return self.frequent if ghost.queue is ghost.owner.recent else self.recent

    def used(self, item: Item, record: Record) -> None:
        """Moves within ``frequent`` only: a second use soon after the first tells nothing."""
        if record.queue is self.frequent:
            self.move(item, self.frequent)

    def choose(self) -> Item | None:
        """The oldest of ``recent`` while that has more than its share, else of ``frequent``."""
        total = self.recent.num_bytes + self.frequent.num_bytes
        first, second = self.recent, self.frequent
        if first.num_bytes <= self.share * total:
            first, second = second, first
        oldest = first.oldest() or second.oldest()
        return oldest[1] if oldest else None


class TwoQueue(BothKinds):
    """New items pass through a short FIFO; only what a ghost asks back joins the LRU of frequent
    ones.

    Source: Johnson, Shasha, "2Q: a low overhead high performance buffer management replacement
    algorithm" (VLDB'94). Candidates: leaf KV, any unlocked checkpoint. Refresh: only in the
    frequent queue. Two kinds: two queues for each, shares in bytes; the tree's ghosts are A1out. KV
    has no ghost that speaks, so its frequent queue stays empty: FIFO.
    """

    def __init__(self) -> None:
        super().__init__(TwoQueueQueues(), TwoQueueQueues())
