"""One request's life on a cache, for tests: match, lock, touch, allocate, insert, give back."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence

import numpy as np

from hybridcache import CacheConfig, PrefixMatch, build_prefix_cache
from hybridcache.allocators.moves import StepPlan
from hybridcache.api import InsertResult, PrefixCache
from hybridcache.hybrid import HybridRadixCache
from hybridcache.tokens import Tokens


def carried_out(cache: PrefixCache) -> StepPlan:
    """The plan that is due, as a cache without tensors carries it out."""
    plan = cache.take_step()
    plan.done()
    return plan


def ids(*parts: str | range | Sequence[int]) -> Tokens:
    """A prompt from words (a letter a token) and ranges."""
    flat: list[int] = []
    for part in parts:
        flat += [ord(letter) for letter in part] if isinstance(part, str) else list(part)
    return np.array(flat, np.int32)


def hybrid(num_kv_tokens: int = 1000, num_slots: int = 10, **options: object) -> HybridRadixCache:
    """A small hybrid cache with a grid of 1 and LRU unless told otherwise."""
    config = CacheConfig(
        num_kv_tokens=num_kv_tokens,
        num_slots=num_slots,
        **({"grid": 1, "state_bytes": 2, "eviction": "lru"} | options),
    )
    cache = build_prefix_cache(config)
    assert isinstance(cache, HybridRadixCache)
    return cache


def publish(
    cache: PrefixCache,
    tokens: Tokens,
    positions: Iterable[int] = (),
    namespace: Hashable = None,
    match: PrefixMatch | None = None,
) -> InsertResult:
    """Insert ``tokens`` with checkpoints at ``positions``; what the cache hands back is freed."""
    cached_len = 0 if match is None else match.cached_len
    new = cache.allocate_kv(len(tokens) - cached_len)
    assert new is not None, "no KV rows to be had"
    known = cache.gather(None if match is None else match.node)
    rows = np.concatenate([known, new])
    saved = []
    for position in positions:
        slot = cache.allocate_slot()
        assert slot is not None, "no slot to be had"
        saved.append((position, slot))
    result = cache.insert(tokens, rows[: len(tokens)], saved, namespace, cached_len)
    cache.free_kv(result.duplicates)
    cache.free_kv(rows[max(result.inserted_len, cached_len) :])
    for slot in result.rejected_slots:
        cache.free_slot(slot)
    return result


def serve(
    cache: PrefixCache,
    tokens: Tokens,
    positions: Iterable[int] = (),
    namespace: Hashable = None,
) -> PrefixMatch:
    """A whole request; returns what it found. Invariants and conservation are checked after it."""
    match = cache.match(tokens, namespace)
    receipt = cache.lock(match.node)
    cache.touch(match)
    publish(cache, tokens, positions, namespace, match)
    cache.unlock(receipt)
    assert match.cached_len + sum(match.losses) == len(tokens)
    cache.check()
    return match


def traffic(seed: int, num_requests: int, longest: int = 200) -> Iterator[Tokens]:
    """Prompts that share beginnings of many lengths."""
    rng = np.random.default_rng(seed)
    seen = [np.empty(0, np.int32)]
    for _ in range(num_requests):
        before = seen[rng.integers(len(seen))]
        kept = before[: rng.integers(len(before) + 1)]
        tokens = np.concatenate([kept, rng.integers(0, 3, rng.integers(1, 60), np.int32)])
        tokens = tokens[:longest]
        seen.append(tokens)
        yield tokens
