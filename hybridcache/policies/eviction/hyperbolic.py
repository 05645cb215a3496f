"""Hyperbolic caching."""

from __future__ import annotations

from hybridcache.policies.eviction.scored import SampledPolicy
from hybridcache.policies.protocol import Item


class Hyperbolic(SampledPolicy):
    """Evict the least (uses + 1) * span / (bytes freed * time in the cache), among 64 samples.

    Source: Blankstein, Sen, Freedman, "Hyperbolic Caching" (ATC'17), with its cost-aware priority.
    Candidates: leaf KV, any unlocked checkpoint. Refresh: counts uses; divided by time since
    creation.
    Two kinds, unequal sizes: cost ``span``, size ``size_bytes``, one order over both.
    """

    orders_classes = False

    def score(self, item: Item) -> float:
        age = self.now - item.created + 1
        return (item.uses + 1) * item.span / (item.size_bytes * age)
