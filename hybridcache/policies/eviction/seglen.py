"""Replay length."""

from __future__ import annotations

from hybridcache.policies.eviction.marconi import Marconi
from hybridcache.policies.protocol import Item

WEIGHT = 0.85
"""Of the replay length; recency has the rest. As published."""


class SegLen(Marconi):
    """Least (1 - weight) * recency + weight * replay length, both min-max normalised over the
    candidates.

    Source: "Prefix Caching for Hybrid LLMs: From Marconi to SegLen in SGLang" (Abdelfattah lab,
    April 2026; sgl-project/sglang#22172, closed): Marconi's score with the FLOPs per byte replaced
    by the tokens that must be replayed from the nearest surviving state above. That both parts are
    normalised is Marconi's rule, for the article gives the weight alone; its worked example evicts
    the longest replay first, against the text beside it, which is followed here. Candidates: leaf
    KV, any unlocked checkpoint. Refresh: the consumed checkpoint. Two kinds: as Marconi, states
    before leaf KV; sizes are ignored. O(candidates) per victim, in one vector expression.
    """

    def __init__(self, weight: float = WEIGHT) -> None:
        """ValueError unless ``weight`` is in [0, 1): 0 is LRU."""
        if not 0 <= weight < 1:
            raise ValueError(f"the weight of the replay length is {weight}, not in [0, 1)")
        super().__init__(weight / (1 - weight))

    def worth(self, item: Item) -> float:
        return item.span
