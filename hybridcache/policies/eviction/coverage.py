"""Coverage thinning."""

from __future__ import annotations

from hybridcache.policies.eviction.scored import ScorePolicy
from hybridcache.policies.protocol import Item


class Coverage(ScorePolicy):
    """Evict the checkpoint nearest to the one above it, so that the rest cover paths evenly.

    KV is evicted in LRU order.

    Source: SGLang #38000 (thin by coverage instead of from the LRU tail).
    Candidates: leaf KV, any unlocked checkpoint. Refresh: a use breaks ties only.
    Two kinds: with a shared budget, the least tokens per byte is evicted. If a new checkpoint above
    reduces the coverage of an item, this takes effect at its next use.
    """

    orders_classes = False

    def score(self, item: Item) -> tuple[float, ...]:
        if item.kind == "kv":
            return (0.0 if item.dead else item.position / item.size_bytes, item.last_used)
        return (item.span / item.size_bytes, item.last_used)
