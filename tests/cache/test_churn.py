"""Random traffic on every kind of cache, page size and pool: nothing leaks, and hits and losses add
up to the prompt."""

from __future__ import annotations

import random

import numpy as np
import pytest

from hybridcache.config import CacheConfig, build_prefix_cache

POOLS = {
    "static": {"num_kv_tokens": 4096, "num_slots": 16},
    "shared": {"total_bytes": 6000, "kv_bytes_per_token": 1, "state_bytes": 100},
}


@pytest.mark.parametrize("prefix_cache", ["hybrid", "radix", "none"])
@pytest.mark.parametrize("pools", POOLS)
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_random_traffic_leaks_no_rows_and_no_slots(prefix_cache, pools, page_size):
    cache = build_prefix_cache(
        CacheConfig(
            prefix_cache=prefix_cache,
            page_size=page_size,
            grid=4,
            ghost_bytes=20_000,
            **POOLS[pools],
        )
    )
    rng = random.Random(7)
    for step in range(600):
        length, base = rng.randint(1, 300), rng.randint(0, 5)
        shared = rng.choice((50, 100, 200, 290))
        tokens = np.array(
            [base if i < shared else rng.randint(0, 3) for i in range(length)], np.int32
        )
        match = cache.match(tokens)
        assert match.cached_len + sum(match.losses) == length
        handle = cache.lock(match.node)
        cache.touch(match)
        rows = cache.gather(match.node)
        assert len(rows) == match.cached_len
        new = cache.allocate_kv(length - match.cached_len)
        assert new is not None
        rows = np.concatenate([rows, new])
        positions = {rng.randint(1, length) for _ in range(2)}
        saved = [(position, cache.allocate_slot()) for position in positions]
        result = cache.insert(
            tokens,
            rows[:length],
            [(position, slot) for position, slot in saved if slot is not None],
            owned_from=match.cached_len,
            after=match.node if rng.random() < 0.5 else None,
        )
        cache.free_kv(result.duplicates)
        cache.free_kv(rows[max(result.inserted_len, match.cached_len) :])
        for slot in result.rejected_slots:
            cache.free_slot(slot)
        assert len(cache.gather(result.node)) == result.inserted_len
        cache.unlock(handle)
        if step % 20 == 0:
            cache.check(held_tokens=0, held_slots=0)
    cache.reset()
    cache.check(held_tokens=0, held_slots=0)
