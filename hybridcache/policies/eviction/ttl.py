"""Time to live."""

from __future__ import annotations

from collections.abc import Mapping

from hybridcache.policies.eviction.scored import ScorePolicy
from hybridcache.policies.protocol import Item

PATIENCE = {"decode": 1.0, "end": 1.0, "prompt": 1.0, "branch": 4.0, "boundary": 4.0}
"""How much longer than one ``ttl`` an item is kept, by the word that asked for it."""


class TTL(ScorePolicy):
    """What expires first goes first; an item lives ``ttl`` requests past its last use, times the
    patience of its label.

    Source: Continuum (2511.02230) pins a prefix for the time its tool call may take; here the pin
    yields under pressure, in order of expiry. Candidates: leaf KV, any unlocked checkpoint.
    Refresh: the consumed checkpoint, the path's KV nodes. Two kinds: KV and unknown labels live one
    ``ttl``; sizes ignored.
    """

    orders_tiers = False

    def __init__(self, ttl: int = 256, patience: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.ttl = ttl
        self.patience = PATIENCE if patience is None else patience

    def score(self, item: Item) -> float:
        return item.last_used + self.ttl * self.patience.get(item.label, 1.0)
