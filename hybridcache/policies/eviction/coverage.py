"""Coverage thinning."""

from __future__ import annotations

from hybridcache.policies.eviction.scored import ScorePolicy
from hybridcache.policies.protocol import Item


class Coverage(ScorePolicy):
    """The checkpoint nearest to the one above it goes first, so that those left cover their paths
    evenly; KV goes least recently used first.

    Source: SGLang #38000 (thin by coverage instead of from the LRU tail). Candidates: leaf KV, any
    unlocked checkpoint. Refresh: a use breaks ties only. Two kinds: where one budget is shared,
    whichever gives up fewer tokens per byte. Coverage that *shrinks* (a checkpoint appears above)
    is seen when the item is used again.
    """

    orders_tiers = False

    def score(self, item: Item) -> tuple[float, ...]:
        if item.kind == "kv":
            return (0.0 if item.dead else item.position / item.size_bytes, item.last_used)
        return (item.span / item.size_bytes, item.last_used)
