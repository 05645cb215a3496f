"""Random eviction."""

from __future__ import annotations

from hybridcache.policies.eviction.scored import SampledPolicy
from hybridcache.policies.protocol import Item


class Random(SampledPolicy):
    """Any candidate, uniformly, under a seed.

    Source: folklore; its competitive bound is why it is the honest control on loops, where LRU
    scores nothing. Candidates: leaf KV, any unlocked checkpoint. Refresh: none. Two kinds: one urn
    (a kind with more candidates loses more).
    """

    orders_tiers = False

    sample = 1

    def score(self, item: Item) -> float:
        return 0.0
