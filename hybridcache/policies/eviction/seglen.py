"""Replay length."""

from __future__ import annotations

from hybridcache.policies.eviction.marconi import Marconi
from hybridcache.policies.protocol import Item

WEIGHT = 0.85
"""Published weight of the replay length. Recency has the rest."""


class SegLen(Marconi):
    """Evict the least (1 - weight) * recency + weight * replay length, both min-max normalised.

    Source: "Prefix Caching for Hybrid LLMs: From Marconi to SegLen in SGLang" (Abdelfattah lab,
    April 2026; sgl-project/sglang#22172, closed). It is Marconi's score with the FLOPs per byte
    replaced by the number of tokens to replay from the nearest state above. The article gives only
    the weight, so the normalisation is Marconi's. Its worked example evicts the longest replay
    first and contradicts its text; this class follows the text.
    Candidates: leaf KV, any unlocked checkpoint. Refresh: the resumed checkpoint.
    Two kinds: as in Marconi, states before leaf KV. Sizes are ignored.
    O(candidates) per victim, in one vector expression.
    """

    def __init__(self, weight: float = WEIGHT) -> None:
        """Create the policy. Raises ValueError unless ``weight`` is in [0, 1). 0 is LRU."""
        if not 0 <= weight < 1:
            raise ValueError(f"The weight of the replay length must be in [0, 1) (got {weight}).")
        super().__init__(weight / (1 - weight))

    def worth(self, item: Item) -> float:
        return item.span
