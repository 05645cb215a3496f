"""Hits per byte freed."""

from __future__ import annotations

from hybridcache.policies.eviction.scored import ScorePolicy
from hybridcache.policies.protocol import Item


class HitsPerToken(ScorePolicy):
    """Least uses per byte freed; ties (most often: never used) least recently used first.

    Source: SGLang #30300 (size-aware eviction: hits divided by the tokens a node holds).
    Candidates: leaf KV, any unlocked checkpoint. Refresh: the consumed checkpoint, the path's KV
    nodes. Two kinds: tokens become ``size_bytes``, so that a state weighs what it weighs.
    """

    orders_tiers = False

    def score(self, item: Item) -> tuple[float, ...]:
        return (item.uses / item.size_bytes, item.last_used)
