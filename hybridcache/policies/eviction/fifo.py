"""First in, first out."""

from __future__ import annotations

from hybridcache.policies.eviction.scored import ScorePolicy
from hybridcache.policies.protocol import Item


class FIFO(ScorePolicy):
    """What entered the cache first goes first, used or not.

    Source: folklore; the control of every caching study. Candidates: leaf KV, any unlocked
    checkpoint. Refresh: none. Two kinds, unequal sizes: one order over both, sizes ignored.
    """

    orders_tiers = False

    def score(self, item: Item) -> float:
        return item.created
