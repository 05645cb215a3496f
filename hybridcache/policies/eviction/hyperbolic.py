"""Hyperbolic caching."""

from __future__ import annotations

from hybridcache.policies.eviction.scored import SampledPolicy
from hybridcache.policies.protocol import Item


class Hyperbolic(SampledPolicy):
    """Least (uses + 1) * tokens to compute again / (bytes freed * time in the cache), among 64
    drawn.

    Source: Blankstein, Sen, Freedman, "Hyperbolic Caching" (ATC'17), with its cost-aware priority.
    Candidates: leaf KV, any unlocked checkpoint. Refresh: uses count, time since creation divides.
    Two kinds, unequal sizes: cost ``span``, size ``size_bytes``, one order over both.
    """

    orders_tiers = False

    def score(self, item: Item) -> float:
        age = self.now - item.created + 1
        return (item.uses + 1) * item.span / (item.size_bytes * age)
