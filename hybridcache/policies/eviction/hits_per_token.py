"""Hits per byte freed."""

from __future__ import annotations

from hybridcache.policies.eviction.scored import ScorePolicy
from hybridcache.policies.protocol import Item


class HitsPerToken(ScorePolicy):
    """Evict the item with the fewest uses per byte freed; ties in LRU order.

    Source: SGLang #30300 (size-aware eviction: hits divided by the tokens of a node).
    Candidates: leaf KV, any unlocked checkpoint. Refresh: the resumed checkpoint, the path's KV.
    Two kinds: tokens are replaced by ``size_bytes``, so that states count with their size.
    """

    orders_classes = False

    def score(self, item: Item) -> tuple[float, ...]:
        return (item.uses / item.size_bytes, item.last_used)
