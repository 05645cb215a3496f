"""Attention-only cache and null cache, and validation of the configuration."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hybridcache import CacheConfig, build_prefix_cache
from tests.cache.serving import (
    ids,
    publish,
)


def test_an_attention_only_cache_resumes_anywhere_on_grid_and_page():
    cache = build_prefix_cache(CacheConfig(prefix_cache="radix", num_kv_tokens=100, grid=4))
    result = publish(cache, ids("abcdefghij"))
    for prompt, cached in (("abcdefghijk", 8), ("abcdefgh", 4), ("abcdefX", 4), ("abX", 0)):
        match = cache.match(ids(prompt))
        assert match.cached_len == cached
        expected = cache.gather(result.node)[:cached].tolist()
        assert cache.gather(match.node).tolist() == expected
        assert sum(match.losses) + cached == len(prompt)


def test_an_attention_only_cache_rejects_states():
    cache = build_prefix_cache(
        CacheConfig(prefix_cache="radix", num_kv_tokens=100, num_slots=1, grid=1)
    )
    assert len(publish(cache, ids("abc"), [3]).rejected_slots) == 1
    cache.check(held_tokens=0, held_slots=0)


def test_an_attention_only_lock_protects_only_the_used_part_of_an_edge():
    cache = build_prefix_cache(CacheConfig(prefix_cache="radix", num_kv_tokens=100, grid=1))
    publish(cache, ids("abcdef"))
    match = cache.match(ids("abcX"))
    handle = cache.lock(match.node)
    rows = cache.gather(match.node)
    assert cache.evict(num_tokens=6).num_tokens == 3
    new = cache.allocate_kv(1)
    result = cache.insert(ids("abcX"), np.concatenate([rows, new]), owned_from=3, after=match.node)
    assert cache.gather(result.node).tolist() == [*rows.tolist(), *new.tolist()]
    cache.unlock(handle)
    cache.check(held_tokens=0)


def test_a_null_cache_stores_nothing():
    cache = build_prefix_cache(
        CacheConfig(prefix_cache="none", num_kv_tokens=100, num_slots=2, grid=1)
    )
    result = publish(cache, ids("hello"), [5])
    assert result.inserted_len == 0 and len(result.rejected_slots) == 1
    assert cache.match(ids("hello!")).losses.never_seen == 6
    cache.check(held_tokens=0, held_slots=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix_cache": "magic", "num_kv_tokens": 8}, "known: hybrid, radix, none"),
        ({"eviction": "magic", "num_kv_tokens": 8, "num_slots": 1}, "unknown eviction"),
        (
            {"eviction": "json:JSONDecoder", "num_kv_tokens": 8, "num_slots": 1},
            "does not implement EvictionPolicy: derive JSONDecoder from hybridcache.EvictionPolicy",
        ),
        ({}, "give the memory: num_kv_tokens and num_slots for two pools, or total_bytes"),
        ({"num_kv_tokens": 8, "num_slots": -1}, r"num_slots must not be negative \(got -1\)"),
        ({"num_kv_tokens": 8, "page_size": 16}, r"at least one page of 16 tokens \(got 8\)"),
        ({"num_kv_tokens": 8, "memory": "pools"}, "For two pools, give num_kv_tokens and num_slot"),
        ({"num_kv_tokens": 8}, "num_slots must be given for a hybrid cache"),
        ({"total_bytes": 8}, "kv_bytes_per_token and state_bytes must be given with total_bytes"),
        (
            {"num_kv_tokens": 8, "num_slots": 1, "host_bytes": 99, "disk_bytes": 99},
            "must be given with host_bytes and disk_bytes",
        ),
        (
            {"num_kv_tokens": 90, "num_slots": 1, "grid": 8, "page_size": 3},
            "grid 8 must be a multiple of page_size 3, or divide it: .* only at those of 24 tokens",
        ),
        ({"num_kv_tokens": 8, "total_bytes": 8}, "got both"),
        ({"num_kv_tokens": 8, "grid": 0}, "at least 1"),
        ({"num_kv_tokens": 8, "ghost_bytes": -1}, "ghost_bytes"),
        ({"total_bytes": 8, "state_bytes": 0}, "at least 1"),
    ],
)
def test_an_invalid_config_raises_an_explanation(options, message):
    with pytest.raises(ValueError, match=message):
        CacheConfig(**options)


@pytest.mark.parametrize("name", ["num_kv_tokens", "num_slots", "grid", "host_bytes"])
def test_sizes_are_integers(name: str) -> None:
    sizes: dict[str, Any] = {"num_kv_tokens": 8, "num_slots": 1}
    with pytest.raises(TypeError, match=rf"{name} must be an integer \(got 1000.0\)"):
        CacheConfig(**sizes | {name: 1e3})
    assert CacheConfig(**sizes | {"num_kv_tokens": np.int64(8)}).num_kv_tokens == 8


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({"num_kv_tokens": 1000, "num_slots": 10}, (1, 100)),
        ({"num_kv_tokens": 4, "num_slots": 10}, (1, 1)),
        ({"num_kv_tokens": 4, "num_slots": 0}, (1, 4)),
        ({"num_kv_tokens": 1000, "num_slots": 10, "state_bytes": 7}, (1, 7)),
        ({"total_bytes": 1000, "kv_bytes_per_token": 2, "state_bytes": 9}, (2, 9)),
        ({"num_kv_tokens": 1000, "prefix_cache": "radix"}, (1, 0)),
    ],
)
def test_default_item_bytes_make_both_pools_weigh_the_same(options, weights):
    """Policies that compare bytes need the size of a state, also if none is configured."""
    assert CacheConfig(**options).item_bytes == weights


def test_a_budget_with_more_rows_than_int32_raises():
    with pytest.raises(ValueError, match="int32"):
        build_prefix_cache(CacheConfig(total_bytes=1 << 60, state_bytes=2))


def test_an_attention_only_budget_has_no_slots():
    cache = build_prefix_cache(CacheConfig(prefix_cache="radix", total_bytes=4096))
    assert cache.allocate_slot() is None and len(cache.allocate_kv(4096)) == 4096
