"""Tail-optimised LRU."""

from __future__ import annotations

from hybridcache.policies.protocol import Item
from hybridcache.policies.scored import ScorePolicy


class TailLRU(ScorePolicy):
    """Items whose loss keeps a prefill within ``target_tokens`` go first, then the rest; each group least recently used first.

    Source: "Tail-Optimized Caching for LLM Inference" (2510.15152; vLLM #37825): what can not break the TTFT target is free
    to evict. The target is given in tokens of prefill (``target_tokens`` of about TTFT x prefill speed). Candidates: leaf
    KV, any unlocked checkpoint. Refresh: the consumed checkpoint, the path's KV nodes. Two kinds: what a loss costs is
    ``span`` for both.
    """

    def __init__(self, target_tokens: int = 1024) -> None:
        super().__init__()
        self.target_tokens = target_tokens

    def score(self, item: Item) -> tuple[float, ...]:
        return (item.span > self.target_tokens, item.last_used)
