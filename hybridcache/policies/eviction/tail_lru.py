"""Tail-optimised LRU."""

from __future__ import annotations

from hybridcache.policies.eviction.scored import Score, ScorePolicy
from hybridcache.policies.protocol import Item


class TailLRU(ScorePolicy):
    """Evict items that the next prefill can miss within ``target_tokens``, then the rest, in LRU
    order.

    Source: "Tail-Optimized Caching for LLM Inference" (arXiv:2510.15152). Of a history of L tokens,
    all but the first L - target can be evicted, because the next turn still meets its TTFT. The
    target is in tokens of prefill (TTFT x prefill speed, less a typical question).
    Candidates: leaf KV, any unlocked checkpoint. Refresh: the resumed checkpoint, the path's KV.
    Two kinds: the loss is the recomputation up to the deepest end of the path since its last use:
    ``span`` plus earlier losses below. In an attention-only cache the loss is ``span``, because
    items are not linked.
    """

    orders_classes = False

    def __init__(self, target_tokens: int = 1024) -> None:
        super().__init__()
        self.target_tokens = target_tokens

    def score(self, item: Item) -> tuple[float, ...]:
        """Return (loss exceeds the target, last use).

        ``memo`` stores (uses, deepest end lost below since then).
        """
        lost_end = item.position
        if item.memo is not None and item.memo[0] == item.uses:
            lost_end = item.memo[1]
        return (lost_end - item.position + item.span > self.target_tokens, item.last_used)

    def evicted(self, item: Item, score: Score) -> None:
        """Add the loss to the checkpoint above."""
        above = item.above
        if item.kind == "kv" or above is None:
            return
        lost_end = item.position
        for each in (item, above):
            if each.memo is not None and each.memo[0] == each.uses:
                lost_end = max(lost_end, each.memo[1])
        above.memo = (above.uses, lost_end)
