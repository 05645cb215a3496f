"""Marconi's score: recency and FLOPs saved per byte."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from hybridcache.policies.eviction.scored import Columns, Seat
from hybridcache.radix.protocol import EvictionPolicy, Item, Kind

ATTENTION_TOKENS = 30_000
"""Position at which attention to all earlier tokens costs as much as the rest of the model (with
the sizes of Qwen3-Next)."""


class Marconi(EvictionPolicy):
    """Evict the least recency + alpha * FLOPs saved per byte, both min-max normalised.

    Source: Pan et al., "Marconi: prefix caching for the era of hybrid LLMs" (MLSys'25), Eq. 1 and
    2. ``alpha`` 0 is LRU. FLOPs count from the checkpoint above to this one, with attention growing
    with position.
    The paper's candidates are nodes with at most one child, but policies cannot see forks.
    O(candidates) per victim, in one vector expression.

    The alpha tuned by replay and the clairvoyant one need the replay of a whole cache; see
    ``hybridcache.lab.baselines.MarconiCache``.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha
        self._dead: OrderedDict[Item, None] = OrderedDict()
        self._columns: dict[Kind, Columns] = {"kv": Columns(), "checkpoint": Columns()}

    def add(self, item: Item) -> None:
        if item.dead:
            self._dead[item] = None
        else:
            item.memo = item.memo or Seat()
            self._columns[item.kind].put(item, 0, item.last_used, efficiency(item))

    touch = add

    def discard(self, item: Item, evicted: bool) -> None:
        if item in self._dead:
            del self._dead[item]
        else:
            self._columns[item.kind].remove(item)

    def victim(self, kind: Kind | None) -> Item | None:
        """Return dead KV, else the least checkpoint, else the least leaf KV. O(candidates)."""
        if kind != "checkpoint" and self._dead:
            return next(iter(self._dead))
        if kind is not None:
            return self._least(self._columns[kind])
        return self._least(self._columns["checkpoint"]) or self._least(self._columns["kv"])

    def _least(self, columns: Columns) -> Item | None:
        """Return the candidate with the least score. A value that is too low after an eviction
        above is updated, and the search repeated."""
        count = len(columns.items)
        if not count:
            return None
        recency = _normalised(columns.times[:count].astype(np.float64))
        while True:
            score = recency + self.alpha * _normalised(columns.worths[:count])
            place = int(np.argmin(score))
            item = columns.items[place]
            worth = efficiency(item)
            if worth <= columns.worths[place]:
                return item
            columns.worths[place] = worth


def efficiency(item: Item) -> float:
    """Return the FLOPs saved per byte (Eq. 1), in units of one token's FLOPs."""
    middle = item.position - item.span / 2
    return item.span * (1 + middle / ATTENTION_TOKENS) / item.size_bytes


def _normalised(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)
