"""Rules of the cache that its plain twin does not state: copies, costs, and the null cache.

``tests/plain_cache.py`` states the others, and the state machines compare every operation with it.
"""

from __future__ import annotations

import pytest

from hybridcache import CacheConfig, build_prefix_cache
from hybridcache.policies.eviction.fifo import FIFO
from tests.cache.serving import hybrid, ids, publish


def test_the_cache_copies_the_arrays_of_the_caller():
    cache = hybrid()
    rows, tokens = cache.allocate_kv(5), ids("hello")
    given = rows.copy()
    result = cache.insert(tokens, given)
    given[:], tokens[:] = 99, 99
    assert cache.gather(result.node).tolist() == rows.tolist()
    assert cache.match(ids("hello!")).kv_match_len == 5


@pytest.mark.parametrize("row", [-1, 1000])
def test_check_finds_a_cached_row_out_of_range(row):
    cache = hybrid(debug=False)
    rows = cache.allocate_kv(3)
    rows[1] = row
    cache.insert(ids("abc"), rows)
    with pytest.raises(AssertionError, match="a cached row is out of range"):
        cache.check()


def test_check_finds_an_arena_that_does_not_notify_the_tree():
    sizes = {"total_bytes": 400, "kv_bytes_per_token": 2, "state_bytes": 20}
    cache = build_prefix_cache(CacheConfig(memory="arena", **sizes))
    cache.check()
    del cache.arena.holders[cache._row_index]
    with pytest.raises(AssertionError, match="the tree is not notified of moves"):
        cache.check()


def test_a_prompt_forks_where_others_go_on_or_nothing_is_known():
    cache = hybrid()
    publish(cache, ids("abcd"))
    publish(cache, ids("abXY"))
    for num_evicted in (0, 8):
        cache.evict(num_tokens=num_evicted)
        found = {text: cache.match(ids(text)).forks for text in ("z", "ab", "abcd", "abcde", "abq")}
        assert found == {"z": True, "ab": True, "abcd": False, "abcde": False, "abq": True}


def test_rows_are_taken_from_kv_and_refusals_and_evictions_are_counted():
    cache = hybrid(8, 3)
    publish(cache, ids("abcd"), [2, 4])
    publish(cache, ids("wxyz"), [4])
    assert cache.allocate_kv(2) is not None
    assert cache.match(ids("abX")).cached_len == 2, "a checkpoint was evicted for rows"
    assert (cache.stats.evictions, cache.stats.refusals) == (1, 0)
    handles = [cache.lock(node) for node in cache.iter_nodes() if node.kv is not None]
    assert cache.allocate_slot() is not None and cache.allocate_slot() is None
    assert (cache.stats.evictions, cache.stats.refusals) == (1, 1)
    for handle in handles:
        cache.unlock(handle)
    cache.check(held_tokens=2, held_slots=1)


def test_a_policy_is_notified_of_uses():
    class Touched(FIFO):
        def touch(self, item):
            touched.append((item.kind, item.uses))

    cache, touched = hybrid(eviction=Touched), []
    cache.refresh(publish(cache, ids("abcd"), [2, 4]).node)
    assert touched == [("checkpoint", 1), ("kv", 1)]


def test_a_checkpoint_is_superseded_until_the_last_lock_with_a_slot_is_returned():
    cache = hybrid()
    publish(cache, ids("abcd"), [4])
    [node] = cache.iter_nodes()
    first, second = cache.lock(node), cache.lock(node)
    slots = [cache.allocate_slot(replaces=handle) for handle in (first, first, second)]
    assert (node.checkpoint.superseded, node.checkpoint.num_successors) == (True, 2)
    cache.unlock(first)
    assert node.checkpoint.superseded
    cache.unlock(second)
    assert not node.checkpoint.superseded
    cache.check(held_tokens=0, held_slots=len(slots))


def test_a_stop_reason_labels_the_deepest_checkpoint_of_an_unforked_answer(monkeypatch):
    cache, relabelled = hybrid(), []
    monkeypatch.setattr(cache.policy, "on_relabelled", relabelled.append)
    publish(cache, ids("abcd"), [2, 4])
    end = publish(cache, ids("abcdef")).node
    for reason in ("length", "length", "tool_use"):
        cache.label_tip(end, reason)
        cache.label_tip(None, reason)
    publish(cache, ids("abcdXY"))
    cache.label_tip(end, "end_turn")
    reasons = [node.checkpoint.stop_reason for node in cache.iter_nodes() if node.checkpoint]
    assert reasons == ["", "tool_use"] and len(relabelled) == 2


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
