"""The controls of the hybrid cache, an attention-only tree and no cache; and configs that make no
sense."""

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


def test_an_attention_only_cache_takes_no_states():
    cache = build_prefix_cache(
        CacheConfig(prefix_cache="radix", num_kv_tokens=100, num_slots=1, grid=1)
    )
    assert len(publish(cache, ids("abc"), [3]).rejected_slots) == 1
    cache.check(held_tokens=0, held_slots=0)


def test_an_attention_only_lock_holds_what_is_used_inside_an_edge_and_no_more():
    cache = build_prefix_cache(CacheConfig(prefix_cache="radix", num_kv_tokens=100, grid=1))
    publish(cache, ids("abcdef"))
    match = cache.match(ids("abcX"))
    receipt = cache.lock(match.node)
    rows = cache.gather(match.node)
    assert cache.evict(num_tokens=6).num_tokens == 3
    new = cache.allocate_kv(1)
    result = cache.insert(ids("abcX"), np.concatenate([rows, new]), owned_from=3, after=match.node)
    assert cache.gather(result.node).tolist() == [*rows.tolist(), *new.tolist()]
    cache.unlock(receipt)
    cache.check(held_tokens=0)


def test_no_cache_keeps_nothing():
    cache = build_prefix_cache(
        CacheConfig(prefix_cache="none", num_kv_tokens=100, num_slots=2, grid=1)
    )
    result = publish(cache, ids("hello"), [5])
    assert result.inserted_len == 0 and len(result.rejected_slots) == 1
    assert cache.match(ids("hello!")).losses.never_seen == 6
    cache.check(held_tokens=0, held_slots=0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prefix_cache": "magic", "num_kv_tokens": 8}, "known: hybrid, radix, none"),
        ({"eviction": "magic", "num_kv_tokens": 8, "num_slots": 1}, "unknown eviction"),
        (
            {"eviction": "json:JSONDecoder", "num_kv_tokens": 8, "num_slots": 1},
            "does not implement EvictionPolicy: derive JSONDecoder from hybridcache.EvictionPolicy",
        ),
        ({}, "give the memory: num_kv_tokens and num_slots for two pools, or total_bytes"),
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
def test_a_config_that_makes_no_sense_says_why(options, sentence):
    with pytest.raises(ValueError, match=sentence):
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
def test_two_pools_of_unknown_sizes_weigh_the_same(options, weights):
    """A policy that compares bytes needs a weight of a state, also where none was given."""
    assert CacheConfig(**options).item_bytes == weights


def test_a_budget_for_more_rows_than_can_be_numbered_is_refused():
    with pytest.raises(ValueError, match="int32"):
        build_prefix_cache(CacheConfig(total_bytes=1 << 60, state_bytes=2))


def test_a_cache_without_states_makes_no_slots():
    cache = build_prefix_cache(CacheConfig(prefix_cache="radix", total_bytes=4096))
    assert cache.allocate_slot() is None and len(cache.allocate_kv(4096)) == 4096
