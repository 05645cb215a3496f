"""Adaptive replacement cache (ARC)."""

from __future__ import annotations

from hybridcache.policies.eviction.queues import BothKinds, Queue, QueuePolicy, Record
from hybridcache.policies.protocol import Item


class ArcQueues(QueuePolicy):
    """Lists ``recent`` (T1) and ``frequent`` (T2), and T1's target bytes, adapted by ghosts."""

    def __init__(self) -> None:
        super().__init__()
        self.recent, self.frequent = Queue(), Queue()
        self.target_bytes = 0.0
        self.num_ghosts = {True: 0, False: 0}
        """Evicted and not returned items, by origin: True for ``recent``."""
        self._chosen: Item | None = None
        self._frequent_asked = False
        """True if the latest ghost hit was of ``frequent``. T1 then also shrinks at its target."""

    def enter(self, item: Item, ghost: Record | None) -> Queue:
        """Enter ``recent``, or ``frequent`` if a ghost returns."""
        self._frequent_asked = False
        return self.recent if ghost is None else self.frequent

    def used(self, item: Item, record: Record) -> None:
        """Move to the young end of ``frequent``, from either list."""
        self.move(item, self.frequent)

    def choose(self) -> Item | None:
        """Return the oldest of ``recent`` above its target, else of ``frequent`` (REPLACE)."""
        held = self.recent.num_bytes
        over = held > self.target_bytes or (self._frequent_asked and held == self.target_bytes)
        first, second = (self.recent, self.frequent) if over else (self.frequent, self.recent)
        self._chosen = first.oldest() or second.oldest()
        return self._chosen

    def gone(self, item: Item, record: Record, evicted: bool) -> None:
        """Count the chosen victim as a ghost, unless it was only locked."""
        if item is not self._chosen:
            return
        self._chosen = None
        if evicted:
            self.num_ghosts[record.queue is self.recent] += 1

    def on_ghost_hit(self, item: Item) -> None:
        """Enlarge the list of the ghost by the item's bytes times the ratio of ghost counts."""
        super().on_ghost_hit(item)
        record: Record | None = item.memo
        if record is None or record.owner is not self:
            return
        from_recent = record.queue is self.recent
        self._frequent_asked = not from_recent
        own, other = self._remembered(from_recent), self._remembered(not from_recent)
        step = max(1.0, other / own) * item.size_bytes
        total = self.recent.num_bytes + self.frequent.num_bytes
        self.target_bytes += step if from_recent else -step
        self.target_bytes = min(max(self.target_bytes, 0.0), float(total))
        self.num_ghosts[from_recent] = max(0, self.num_ghosts[from_recent] - 1)

    def _remembered(self, from_recent: bool) -> int:
        """Return |B1| or |B2|, at least 1, with the paper's bounds.

        T1 with B1, and B1 with B2, may not exceed the size of the cache.
        """
        recent = min(self.num_ghosts[True], len(self.frequent))
        if from_recent:
            return max(1, recent)
        capacity = len(self.recent) + len(self.frequent)
        return max(1, min(self.num_ghosts[False], capacity - recent))


class ARC(BothKinds):
    """Evict from one of two LRU lists, used once and used again. Ghost hits adapt their sizes.

    Source: Megiddo, Modha, "ARC: a self-tuning, low overhead replacement cache" (FAST'03).
    Candidates: leaf KV, any unlocked checkpoint. Refresh: the resumed checkpoint, the path's KV.
    Two kinds: two lists for each, with the target in bytes. The tree's ghosts are B1 and B2. They
    exist for checkpoints only, so KV's target stays 0 and its used items are kept longest.
    """

    queues = ArcQueues
