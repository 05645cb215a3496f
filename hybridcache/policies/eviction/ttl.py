"""Time to live."""

from __future__ import annotations

from collections.abc import Mapping

from hybridcache.policies.eviction.scored import ScorePolicy
from hybridcache.policies.protocol import Item

PATIENCE = {"decode": 1.0, "end": 1.0, "prompt": 1.0, "branch": 4.0, "boundary": 4.0}
"""Multiple of ``ttl`` that an item is kept for, by its label."""


class TTL(ScorePolicy):
    """Evict the item that expires first: ``ttl`` requests after its last use, times ``patience``.

    Source: Continuum (arXiv:2511.02230) pins a prefix for the expected time of its tool call. Here
    pins yield under memory pressure, in order of expiry.
    Candidates: leaf KV, any unlocked checkpoint. Refresh: the resumed checkpoint, the path's KV.
    Two kinds: KV and unknown labels live one ``ttl``. Sizes are ignored.
    """

    orders_classes = False

    def __init__(self, ttl: int = 256, patience: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.ttl = ttl
        self.patience = PATIENCE if patience is None else patience

    def score(self, item: Item) -> float:
        return item.last_used + self.ttl * self.patience.get(item.label, 1.0)
