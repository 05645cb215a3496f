"""Load or compute: which checkpoint in lower tiers a request loads to the device."""

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
    """Load the checkpoint of ``match.lower`` that saves the most time, if one saves any.

    ``receipt`` is a lock on ``match.node``. Returns a match of ``tokens`` after the load and a lock
    on its node; both are the ones given if nothing was loaded. O(len(tokens)).
    """
    if exchange is None or not _fetch_best(cache, match, exchange):
        return match, receipt
    cache.unlock(receipt)
    match = cache.match(tokens, match.namespace)
    return match, cache.lock(match.node)


def _fetch_best(cache: PrefixCache, match: PrefixMatch, exchange: FetchRule) -> bool:
    """Return False if no load saves time, or the device has no room for it."""
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
