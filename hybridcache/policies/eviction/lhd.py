"""Least hit density: expected hits per byte, from counts by age and uses."""

from __future__ import annotations

import numpy as np

from hybridcache.policies.eviction.scored import SampledPolicy
from hybridcache.radix.protocol import Item

NUM_AGES = 24
"""Age bins. Bin b contains ages in [2**b - 1, 2**(b + 1) - 1) requests."""
NUM_CLASSES = 4
"""Classes by uses: 0, 1, 2, 3 or more."""
RECOMPUTE_EVERY = 256
DECAY = 0.9


class LHD(SampledPolicy):
    """Evict the least expected hits per byte and remaining lifetime, among 64 samples.

    Source: Beckmann, Chen, Cidon, "LHD: improving cache hit rate by maximizing hit density"
    (NSDI'18). For each class (kind, uses) the policy counts the ages of uses and evictions. The
    density at age a is hits from a on / time lived from a on. It is recomputed every 256 events
    from counts that decay by 0.9.
    Two kinds, unequal sizes: the kind is part of the class; density is per byte of ``size_bytes``.
    """

    orders_classes = False

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        shape = (2 * NUM_CLASSES, NUM_AGES)
        self._hits, self._evictions = np.zeros(shape), np.zeros(shape)
        self._density = np.tile(1.0 / (1 << np.arange(NUM_AGES)), (shape[0], 1))
        self._events = 0

    def score(self, item: Item) -> float:
        return float(self._density[self._place(item, item.uses)]) / item.size_bytes

    def add(self, item: Item) -> None:
        super().add(item)
        self._count_use(item)

    def touch(self, item: Item) -> None:
        super().touch(item)
        self._count_use(item)

    def evicted(self, item: Item) -> None:
        self._evictions[self._place(item, item.uses)] += 1
        self._event()

    def _count_use(self, item: Item) -> None:
        """Count a new use. ``memo`` stores (uses, last use) at the last update."""
        if item.memo is not None and item.uses > item.memo[0]:
            row, _ = self._place(item, item.memo[0])
            self._hits[row, _age_bin(item.last_used - item.memo[1])] += 1
            self._event()
        item.memo = (item.uses, item.last_used)

    def _place(self, item: Item, uses: int) -> tuple[int, int]:
        row = min(uses, NUM_CLASSES - 1) + NUM_CLASSES * (item.kind == "checkpoint")
        return row, _age_bin(self.now - item.last_used)

    def _event(self) -> None:
        self._events += 1
        if self._events % RECOMPUTE_EVERY:
            return
        widths = np.exp2(np.arange(NUM_AGES))
        ended = self._hits + self._evictions
        hits_from = np.cumsum(self._hits[:, ::-1], axis=1)[:, ::-1]
        alive = np.cumsum(ended[:, ::-1], axis=1)[:, ::-1]
        lived_from = np.cumsum((alive * widths)[:, ::-1], axis=1)[:, ::-1]
        known = lived_from > 0
        self._density[known] = hits_from[known] / lived_from[known]
        self._hits *= DECAY
        self._evictions *= DECAY


def _age_bin(age: int) -> int:
    return min((age + 1).bit_length() - 1, NUM_AGES - 1)
