"""Least frequently used, with ageing."""

from __future__ import annotations

from hybridcache.policies.eviction.scored import Score, ScorePolicy
from hybridcache.policies.protocol import Item


class LFU(ScorePolicy):
    """Evict the least used item; new items start at the score of the last victim (LFU-DA).

    This ageing lets items with many old uses expire.

    Source: Arlitt et al., "Evaluating content management techniques for Web proxy caches", 2000.
    Candidates: leaf KV, any unlocked checkpoint. Refresh: the resumed checkpoint, the path's KV.
    Two kinds: one order over both. Sizes are ignored (``gdsf`` adds sizes and costs).
    """

    orders_classes = False

    def __init__(self) -> None:
        super().__init__()
        self.age = 0.0

    def score(self, item: Item) -> float:
        """Return uses + age at the latest use. ``memo`` stores (uses, age)."""
        if item.memo is None or item.memo[0] != item.uses:
            item.memo = (item.uses, self.age)
        return float(item.uses + 1 + item.memo[1])

    def evicted(self, item: Item, score: Score) -> None:
        assert isinstance(score, float)
        self.age = max(self.age, score)
