"""Greedy dual size frequency, and scores with an age."""

from __future__ import annotations

from hybridcache.policies.eviction.scored import Score, ScorePolicy
from hybridcache.radix.protocol import Item


class Ageing(ScorePolicy):
    """Scores on top of an age: the last victim's score, as of the item's latest use. So items with
    many old uses expire."""

    orders_classes = False

    def __init__(self) -> None:
        super().__init__()
        self.age = 0.0

    def age_of(self, item: Item) -> float:
        """Return the age at the latest use of ``item``. ``memo`` stores (uses, age)."""
        if item.memo is None or item.memo[0] != item.uses:
            item.memo = (item.uses, self.age)
        return float(item.memo[1])

    def evicted(self, item: Item, score: Score) -> None:
        assert isinstance(score, float)
        self.age = max(self.age, score)


class GDSF(Ageing):
    """Evict the least age + uses * span / bytes freed.

    Source: Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency", 1998;
    as PGDSF in RAGCache (arXiv:2404.12457).
    Two kinds, unequal sizes: cost is ``span``, size is ``size_bytes`` in MiB; one order over both.
    """

    def score(self, item: Item) -> float:
        return self.age_of(item) + (item.uses + 1) * item.span / (item.size_bytes / 2**20)
