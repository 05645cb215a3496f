"""Tail-optimised LRU."""

from __future__ import annotations

from hybridcache.policies.eviction.scored import Score, ScorePolicy
from hybridcache.policies.protocol import Item


class TailLRU(ScorePolicy):
    """Items whose loss keeps the next prefill within ``target_tokens`` go first, then the rest;
    each group least recently used first.

    Source: "Tail-Optimized Caching for LLM Inference" (2510.15152): of a history of L tokens all
    but the first L - target are free to evict, for the next turn still meets its TTFT. The target
    is given in tokens of prefill (TTFT x prefill speed, less a usual question). Candidates: leaf
    KV, any unlocked checkpoint. Refresh: the consumed checkpoint, the path's KV nodes. Two kinds: a
    loss is what must be computed again up to the deepest end that this path had since its last use:
    ``span``, and what went before below it. In an attention-only cache, where no item stands above
    another, ``span`` alone.
    """

    orders_tiers = False

    def __init__(self, target_tokens: int = 1024) -> None:
        super().__init__()
        self.target_tokens = target_tokens

    def score(self, item: Item) -> tuple[float, ...]:
        """(whether its loss would break the target, last use). ``memo`` holds (uses, deepest end
        lost below since)."""
        lost_end = item.position
        if item.memo is not None and item.memo[0] == item.uses:
            lost_end = item.memo[1]
        return (lost_end - item.position + item.span > self.target_tokens, item.last_used)

    def evicted(self, item: Item, score: Score) -> None:
        """The checkpoint above answers for what is lost from here on."""
        above = item.above
        if item.kind == "kv" or above is None:
            return
        lost_end = item.position
        for each in (item, above):
            if each.memo is not None and each.memo[0] == each.uses:
                lost_end = max(lost_end, each.memo[1])
        above.memo = (above.uses, lost_end)
