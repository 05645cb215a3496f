"""A stateless eviction policy: one score for each item.

The item with the lowest score is evicted first. ``hybridcache.Item`` lists everything that a
policy may read. Compare it with LRU from this folder:

    hybridcache simulate --trace short --model qwen3-next --gib 1 \\
        --policy lru,tokens_per_byte:TokensPerByte
"""

from hybridcache import Item, ScorePolicy


class TokensPerByte(ScorePolicy):
    """Evicts the item that saves the fewest tokens per byte, weighted by its uses.

    ``span`` is the number of tokens that the next request computes again if the item is evicted.
    The score of an item changes only when it is used, which ``ScorePolicy`` requires: scores that
    fall with time belong in a ``SampledPolicy``.
    """

    def score(self, item: Item) -> float:
        """Return the value of keeping ``item``: expected tokens saved per byte of memory."""
        return (item.uses + 1) * item.span / item.size_bytes
