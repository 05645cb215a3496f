"""Random eviction."""

from __future__ import annotations

from hybridcache.policies.eviction.scored import SampledPolicy
from hybridcache.policies.protocol import Item


class Random(SampledPolicy):
    """Evict a uniformly random candidate. Deterministic for a given seed.

    Source: folklore. Random eviction has a competitive bound, which makes it a useful control on
    loops, where LRU has no hits.
    Candidates: leaf KV, any unlocked checkpoint. Refresh: none.
    Two kinds: drawn together, so the kind with more candidates loses more.
    """

    orders_classes = False

    sample = 1

    def score(self, item: Item) -> float:
        return 0.0
