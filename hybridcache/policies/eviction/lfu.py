"""Least frequently used, with ageing."""

from __future__ import annotations

from hybridcache.policies.eviction.scored import Score, ScorePolicy
from hybridcache.policies.protocol import Item


class LFU(ScorePolicy):
    """Least uses first, where a newcomer starts at the worth of the last victim, so that old fame
    fades (LFU-DA).

    Source: Arlitt et al., "Evaluating content management techniques for Web proxy caches", 2000.
    Candidates: leaf KV, any unlocked checkpoint. Refresh: the consumed checkpoint, the KV nodes of
    the path. Two kinds: one order over both; sizes ignored (``gdsf`` is the same with sizes and
    costs).
    """

    orders_tiers = False

    def __init__(self) -> None:
        super().__init__()
        self.age = 0.0

    def score(self, item: Item) -> float:
        """Uses + the age at its latest use; the age stands in ``memo`` with the use it belongs
        to."""
        if item.memo is None or item.memo[0] != item.uses:
            item.memo = (item.uses, self.age)
        return float(item.uses + 1 + item.memo[1])

    def evicted(self, item: Item, score: Score) -> None:
        assert isinstance(score, float)
        self.age = max(self.age, score)
