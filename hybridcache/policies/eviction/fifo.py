"""First in, first out: the control of caching studies."""

from __future__ import annotations

from hybridcache.policies.eviction.scored import ScorePolicy
from hybridcache.radix.protocol import Item


class FIFO(ScorePolicy):
    """Evict the item that entered the cache first, regardless of uses.

    Source: folklore; the control of caching studies.
    Two kinds, unequal sizes: one order over both. Sizes are ignored.
    """

    orders_classes = False

    def score(self, item: Item) -> float:
        return item.created
