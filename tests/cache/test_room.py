"""Allocation: it evicts as much as it needs, or is refused and evicts nothing."""

from __future__ import annotations

from hybridcache import CacheConfig, build_prefix_cache
from tests.cache.serving import (
    hybrid,
    ids,
    serve,
)


def test_an_allocation_evicts_no_more_than_it_needs():
    cache = hybrid(num_kv_tokens=20)
    for prompt in ("aaaaa", "bbbbb", "ccccc", "ddddd"):
        serve(cache, ids(prompt), [5])
    assert len(cache.allocate_kv(7)) == 7
    assert cache.cached_tokens == 10
    assert cache.match(ids("ccccc!")).cached_len == 5


def test_allocating_a_slot_evicts_a_checkpoint():
    cache = hybrid(num_slots=2)
    serve(cache, ids("one"), [3])
    serve(cache, ids("two"), [3])
    assert cache.allocate_slot() is not None
    assert cache.match(ids("one!")).kv_match_len == 0
    assert cache.match(ids("two!")).cached_len == 3


def test_a_refused_allocation_evicts_nothing():
    cache = hybrid(num_kv_tokens=20, num_slots=3)
    serve(cache, ids("aaaaa"), [5])
    serve(cache, ids("bbbbb"), [5])
    handle = cache.lock(cache.match(ids("aaaaa!")).node)
    held = cache.allocate_kv(8)
    assert cache.allocate_kv(8) is None, "2 free and 5 evictable rows cannot give 8"
    assert cache.match(ids("bbbbb!")).cached_len == 5
    assert cache.stats.refusals == 1
    assert len(cache.allocate_kv(7)) == 7
    assert cache.match(ids("bbbbb!")).cached_len == 0
    cache.unlock(handle)
    cache.free_kv(held)


def test_allocate_slot_returns_none_if_all_slots_are_locked():
    cache = hybrid(num_slots=1)
    serve(cache, ids("one"), [3])
    handle = cache.lock(cache.match(ids("one!")).node)
    assert cache.allocate_slot() is None
    cache.unlock(handle)
    assert cache.allocate_slot() is not None


def test_reset_drops_everything_that_is_not_locked():
    cache = hybrid()
    serve(cache, ids("one"), [3])
    serve(cache, ids("two"), [3])
    handle = cache.lock(cache.match(ids("one!")).node)
    cache.reset()
    assert cache.match(ids("one!")).cached_len == 3
    assert cache.match(ids("two!")).seen_len == 0
    cache.unlock(handle)
    cache.reset()
    assert cache.num_nodes == 0


def shared(**options):
    config = CacheConfig(
        **({"total_bytes": 100, "kv_bytes_per_token": 2, "state_bytes": 20, "grid": 1} | options)
    )
    return build_prefix_cache(config)


def test_states_are_evicted_for_kv_and_kv_for_states():
    cache = shared()
    serve(cache, ids("aa"), [2])
    serve(cache, ids("bb"), [2])
    serve(cache, ids("cc"), [2])
    assert cache.num_checkpoints == 3
    rows = cache.allocate_kv(40)
    assert len(rows) == 40 and cache.num_checkpoints == 0
    cache.free_kv(rows)
    serve(cache, ids(range(40)))
    assert cache.allocate_slot() is not None
    assert cache.allocate_slot() is not None
    assert cache.cached_tokens == 0


def test_a_budget_evicts_the_older_item_of_both_kinds():
    cache = shared(total_bytes=64, dead_first=False)
    serve(cache, ids("aa"))
    serve(cache, ids("bb"), [2])
    assert len(cache.allocate_kv(19)) == 19
    assert cache.match(ids("aa!")).kv_match_len == 0
    assert cache.match(ids("bb!")).cached_len == 2


def test_the_budget_is_never_exceeded_and_refusals_evict_nothing():
    cache = shared()
    serve(cache, ids("aa"), [2])
    assert cache.allocate_kv(51) is None
    assert cache.match(ids("aa!")).cached_len == 2
    slots = [cache.allocate_slot() for _ in range(6)]
    assert sum(slot is not None for slot in slots) == 5
    cache.check(held_tokens=0, held_slots=5)


def test_locked_checkpoints_do_not_count_as_evictable():
    cache = shared()
    serve(cache, ids("aa"), [2])
    serve(cache, ids("bb"), [2])
    handle = cache.lock(cache.match(ids("aa!")).node)
    unlocked_bytes = cache._pages.budget.total_bytes - 2 * 2 - 20
    assert cache.allocate_kv(unlocked_bytes // 2 + 1) is None
    assert cache.match(ids("bb!")).cached_len == 2, "a refused allocation evicted something"
    assert cache.allocate_kv(unlocked_bytes // 2) is not None
    cache.unlock(handle)
