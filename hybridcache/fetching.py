"""Fetch or recompute: which of what lies in lower tiers a request brings to the device."""

from __future__ import annotations

from typing import Any

from hybridcache.interface import PrefixCache
from hybridcache.policies.protocol import FetchRule
from hybridcache.results import PrefixMatch
from hybridcache.tokens import Tokens


def bring_up(
    cache: PrefixCache,
    match: PrefixMatch,
    receipt: Any,
    tokens: Tokens,
    exchange: FetchRule | None,
) -> tuple[PrefixMatch, Any]:
    """Fetch what of ``match.lower`` saves the most time; without an ``exchange`` nothing does.

    ``receipt`` is a lock on ``match.node``. Returns the match of ``tokens`` then and a lock on its
    node; what is left below is a loss with a cause. O(len(tokens)).
    """
    if exchange is not None and _fetch_best(cache, match, exchange):
        cache.unlock(receipt)
        match = cache.match(tokens, match.namespace)
        receipt = cache.lock(match.node)
    if match.lower:
        num_left = match.lower[-1].position - match.cached_len
        losses = match.losses.reached(num_left)._replace(not_fetched=num_left)
        match = match._replace(losses=losses)
    return match, receipt


def _fetch_best(cache: PrefixCache, match: PrefixMatch, exchange: FetchRule) -> bool:
    """False: nothing saves time, or there is no room for it."""
    lower = cache.lower
    assert lower is not None
    best, most = None, 0.0
    for one in match.lower:
        num_bytes = {
            word: rows * lower.row_bytes for word, rows in zip(lower.words, one.rows, strict=True)
        }
        saved = exchange.seconds_saved(match.cached_len, one.position, match.num_tokens, num_bytes)
        if saved > most:
            best, most = one, saved
    return best is not None and cache.fetch(best)
