"""Greedy dual size frequency (GDSF)."""

from __future__ import annotations

from hybridcache.policies.eviction.scored import Score, ScorePolicy
from hybridcache.policies.protocol import Item


class GDSF(ScorePolicy):
    """Evict the least age + uses * span / bytes freed.

    Source: Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency", 1998;
    as PGDSF in RAGCache (arXiv:2404.12457).
    Candidates: leaf KV, any unlocked checkpoint. Refresh: the resumed checkpoint, the path's KV.
    Two kinds, unequal sizes: cost is ``span``, size is ``size_bytes`` in MiB; one order over both.
    """

    orders_classes = False

    def __init__(self) -> None:
        super().__init__()
        self.age = 0.0

    def score(self, item: Item) -> float:
        if item.memo is None or item.memo[0] != item.uses:
            item.memo = (item.uses, self.age)
        worth = (item.uses + 1) * item.span / (item.size_bytes / 2**20)
        return float(item.memo[1] + worth)

    def evicted(self, item: Item, score: Score) -> None:
        assert isinstance(score, float)
        self.age = max(self.age, score)
