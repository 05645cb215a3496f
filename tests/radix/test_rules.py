"""Rules of the cache that its plain twin does not state: copies, costs, and the null cache.

``tests/plain_cache.py`` states the others, and the state machines compare every operation with it.
"""

from __future__ import annotations

import pytest

from hybridcache import CacheConfig, build_prefix_cache
from hybridcache.policies.eviction.fifo import FIFO
from tests.radix.serving import hybrid, ids, publish
from tests.refused import refused


@pytest.mark.parametrize("row", [-1, 1000])
def test_check_finds_a_cached_row_out_of_range(row):
    cache = hybrid(debug=False)
    rows = cache.allocate_kv(3)
    rows[1] = row
    cache.insert(ids("abc"), rows)
    refused("a cached row is out of range", cache.check, kind=AssertionError)


def test_check_finds_an_arena_that_does_not_notify_the_tree():
    sizes = {"total_bytes": 400, "kv_bytes_per_token": 2, "state_bytes": 20}
    cache = build_prefix_cache(CacheConfig(memory="arena", **sizes))
    cache.check()
    del cache.arena.holders[cache._row_index]
    refused("the tree is not notified of moves", cache.check, kind=AssertionError)


def test_a_policy_is_notified_of_uses():
    class Touched(FIFO):
        def touch(self, item):
            touched.append((item.kind, item.uses))

    cache, touched = hybrid(eviction=Touched), []
    cache.refresh(publish(cache, ids("abcd"), [2, 4]).node)
    assert touched == [("checkpoint", 1), ("kv", 1)]


def test_the_state_of_an_ended_session_is_superseded_until_another_one_forks_off():
    cache = hybrid()

    def superseded():
        return {n.end: n.checkpoint.superseded for n in cache.iter_nodes() if n.checkpoint}

    publish(cache, ids("abcd"), [2, 4])
    end = publish(cache, ids("abcdef")).node
    cache.label_tip(end, "session_end")
    assert superseded() == {2: True, 4: True}
    cache.check()
    cache.label_tip(end, "end_turn")
    assert superseded() == {2: True, 4: False}
    cache.label_tip(end, "session_end")
    publish(cache, ids("abcdeXY"))  # It serves another conversation now.
    assert superseded() == {2: True, 4: False}
    cache.check()
    publish(cache, ids("zyx"), [3])
    cache.label_tip(publish(cache, ids("zyxw")).node, "session_end")
    cache.evict(num_slots=1)  # The oldest superseded one.
    cache.evict(num_slots=1)
    assert superseded() == {4: False}
    cache.check(held_tokens=0, held_slots=0)


def test_without_the_state_of_an_ended_session_the_one_above_is_not_superseded():
    cache = hybrid()
    publish(cache, ids("abcd"), [2, 4])
    cache.label_tip(publish(cache, ids("abcdef")).node, "session_end")
    last = next(n for n in cache.iter_nodes() if n.end == 4)
    cache._drop_checkpoint(last)
    assert [n.checkpoint.superseded for n in cache.iter_nodes() if n.checkpoint] == [False]
    cache.check()


def test_match_changes_nothing():
    cache = hybrid()
    publish(cache, ids("hello world"), [5, 11])
    before = cache.render()
    for prompt in ("hello", "help", "hello world", "hello w", "bye"):
        cache.match(ids(prompt))
    assert cache.render() == before
    assert cache.stats.total.requests == 0


def test_a_null_cache_stores_nothing():
    cache = hybrid(prefix_cache="none")
    result = publish(cache, ids("hello"), [5])
    assert result.inserted_len == 0 and len(result.rejected_slots) == 1
    assert cache.match(ids("hello!")).losses.never_seen == 6
    cache.check(held_tokens=0, held_slots=0)


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
