"""ARC."""

from __future__ import annotations

from hybridcache.policies.protocol import Item
from hybridcache.policies.queues import BothKinds, Queue, QueuePolicy, Record


class ArcQueues(QueuePolicy):
    """``recent`` (T1), ``frequent`` (T2) and the bytes that T1 should have, moved by ghosts."""

    def __init__(self) -> None:
        super().__init__()
        self.recent, self.frequent = Queue(), Queue()
        self.target_bytes = 0.0
        self.num_ghosts = {True: 1, False: 1}
        """Evicted and not asked back, by whether they came from ``recent``."""
        self._chosen: Item | None = None

    def enter(self, item: Item, returning: bool) -> Queue:
        return self.frequent if returning else self.recent

    def used(self, item: Item, record: Record) -> None:
        self.move(item, self.frequent)

    def choose(self) -> Item | None:
        first, second = self.recent, self.frequent
        if first.num_bytes <= self.target_bytes:
            first, second = second, first
        oldest = first.oldest() or second.oldest()
        self._chosen = oldest[1] if oldest else None
        return self._chosen

    def gone(self, item: Item, record: Record) -> None:
        if item is self._chosen:
            self._chosen = None
            self.num_ghosts[record.queue is self.recent] += 1

    def missed(self, item: Item) -> None:
        super().missed(item)
        record: Record = item.memo
        from_recent = record.queue is self.recent
        ratio = self.num_ghosts[not from_recent] / self.num_ghosts[from_recent]
        step = max(1.0, ratio) * item.size_bytes
        total = self.recent.num_bytes + self.frequent.num_bytes
        self.target_bytes += step if from_recent else -step
        self.target_bytes = min(max(self.target_bytes, 0.0), float(total))
        self.num_ghosts[from_recent] = max(1, self.num_ghosts[from_recent] - 1)


class ARC(BothKinds):
    """Two LRU lists, used once and used again; whichever's ghosts are asked for gets more room.

    Source: Megiddo, Modha, "ARC: a self-tuning, low overhead replacement cache" (FAST'03). Candidates: leaf KV, any unlocked
    checkpoint. Refresh: the consumed checkpoint, the path's KV nodes. Two kinds: the lists for each, the target in bytes; the
    tree's ghosts are B1 and B2 (checkpoints only, so KV's target stays 0: its used items are kept longest).
    """

    def __init__(self) -> None:
        super().__init__(ArcQueues(), ArcQueues())
