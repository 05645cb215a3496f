"""Class-aware age."""

from __future__ import annotations

from collections import defaultdict

from hybridcache.policies.eviction.scored import SampledPolicy
from hybridcache.policies.protocol import Item

Class = tuple[str, str, int, bool]


class ClassAge(SampledPolicy):
    """Evict the least P(reuse | class) * span / (bytes freed * age), among 64 samples.

    Source: the first draft of this project's ``survival``. A class is (kind, label, uses up to 3,
    superseded). P is the fraction of all items that ever entered the class and were used again,
    starting at one in two. Ghost hits count as uses.
    Candidates: leaf KV, any unlocked checkpoint. Refresh: a use resets the age.
    Two kinds, unequal sizes: ``span`` over ``size_bytes`` for both.
    """

    orders_classes = False

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._entered: defaultdict[Class, int] = defaultdict(lambda: 2)
        self._reused: defaultdict[Class, int] = defaultdict(lambda: 1)

    def score(self, item: Item) -> float:
        key = _class(item)
        chance = self._reused[key] / self._entered[key]
        return chance * item.span / (item.size_bytes * (self.now - item.last_used + 1))

    def add(self, item: Item) -> None:
        super().add(item)
        self._count(item)

    def touch(self, item: Item) -> None:
        super().touch(item)
        self._count(item)

    def on_ghost_hit(self, item: Item) -> None:
        if item.memo is not None:
            self._reused[item.memo[1]] += 1

    def _count(self, item: Item) -> None:
        """Update the counts. ``memo`` stores (uses, class) at the last update."""
        key = _class(item)
        if item.memo is None:
            self._entered[key] += 1
        elif item.uses > item.memo[0]:
            self._reused[item.memo[1]] += 1
            self._entered[key] += 1
        item.memo = (item.uses, key)


def _class(item: Item) -> Class:
    return item.kind, item.label, min(item.uses, 3), item.superseded
