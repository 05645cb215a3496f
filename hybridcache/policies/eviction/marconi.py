"""Marconi's score."""

from __future__ import annotations

import numpy as np

from hybridcache.policies.eviction.columns import Columns
from hybridcache.policies.protocol import EvictionPolicy, Item, Kind

ATTENTION_TOKENS = 30_000
"""Position at which attention to all before costs a token as much as everything else (Qwen3-Next's
sizes)."""


class Marconi(EvictionPolicy):
    """Least recency + alpha * FLOPs saved per byte, both min-max normalised over the candidates.

    Source: Pan et al., "Marconi: prefix caching for the era of hybrid LLMs" (MLSys'25), Eq. 1 and
    2; ``alpha`` 0 is LRU. FLOPs are those from the checkpoint above to this one, attention growing
    with position. Candidates: leaf KV, any unlocked checkpoint (the paper: nodes with at most one
    child; what a policy sees does not tell a fork). Refresh: the consumed checkpoint. Two kinds,
    unequal sizes: bytes freed. The alpha tuned by replay and the clairvoyant one need a whole cache
    to replay: they are ``hybridcache.lab.baselines.MarconiCache`` and a study. O(candidates) per
    victim, in one vector expression.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha
        self._dead: dict[Item, None] = {}
        self._columns: dict[Kind, Columns] = {"kv": Columns(), "checkpoint": Columns()}

    def worth(self, item: Item) -> float:
        """What keeping ``item`` saves, beside recency; it must not fall while nobody uses it."""
        return efficiency(item)

    def add(self, item: Item) -> None:
        """O(1); dead KV waits in a queue of its own."""
        if item.dead:
            self._dead[item] = None
        else:
            self._columns[item.kind].put(item, 0, item.last_used, self.worth(item))

    def discard(self, item: Item, evicted: bool) -> None:
        """O(1)."""
        if item in self._dead:
            del self._dead[item]
        else:
            self._columns[item.kind].remove(item)

    def touch(self, item: Item) -> None:
        """Its recency and its FLOPs per byte are new. O(1)."""
        if item not in self._dead:
            self._columns[item.kind].put(item, 0, item.last_used, self.worth(item))

    def victim(self, kind: Kind | None) -> Item | None:
        """Dead KV, else the least of the checkpoints, else of leaf KV. O(candidates)."""
        if kind != "checkpoint" and self._dead:
            return next(iter(self._dead))
        if kind is not None:
            return self._least(self._columns[kind])
        return self._least(self._columns["checkpoint"]) or self._least(self._columns["kv"])

    def _least(self, columns: Columns) -> Item | None:
        """The candidate of least score. What an eviction above it made worth more is put right as
        it comes up."""
        count = len(columns)
        if not count:
            return None
        recency = _normalised(columns.times[:count].astype(np.float64))
        while True:
            score = recency + self.alpha * _normalised(columns.worths[:count])
            place = int(np.argmin(score))
            item = columns.items[place]
            worth = self.worth(item)
            if worth <= columns.worths[place]:
                return item
            columns.worths[place] = worth


def efficiency(item: Item) -> float:
    """Eq. 1 in tokens' worth of FLOPs per byte."""
    middle = item.position - item.span / 2
    return item.span * (1 + middle / ATTENTION_TOKENS) / item.size_bytes


def _normalised(
    values: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)
