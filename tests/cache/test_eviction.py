"""Eviction order of the hybrid cache, one behaviour per test."""

from __future__ import annotations

import pytest

from tests.cache.serving import (
    hybrid,
    ids,
    publish,
    serve,
)


def test_an_empty_cache_has_nothing_to_evict():
    assert hybrid().evict(num_tokens=5, num_slots=5) == (0, 0)


def test_all_unlocked_items_can_be_evicted():
    cache = hybrid()
    for prompt in ("one", "two", "three", "two four"):
        publish(cache, ids(prompt), [len(prompt)])
    cache.evict(num_tokens=1000)
    assert cache.cached_tokens == 0 and cache.num_checkpoints == 0
    cache.check(held_tokens=0, held_slots=0)


def test_the_least_recently_used_leaf_is_evicted_first():
    cache = hybrid()
    for prompt in ("one", "two", "six"):
        serve(cache, ids(prompt), [3])
    cache.touch(cache.match(ids("one!")))
    cache.evict(num_tokens=3)
    assert cache.match(ids("two!")).kv_match_len == 0
    cache.evict(num_tokens=3)
    assert cache.match(ids("six!")).kv_match_len == 0
    assert cache.match(ids("one!")).cached_len == 3


def test_leaves_are_evicted_before_shared_prefixes():
    cache = hybrid()
    serve(cache, ids("system", "one"), [6, 9])
    serve(cache, ids("system", "two"), [9])
    cache.evict(num_tokens=3)
    assert cache.match(ids("system", "two", "!")).cached_len == 9
    assert cache.match(ids("system", "one")).cached_len == 6
    cache.evict(num_tokens=3)
    assert cache.match(ids("system", "one")).cached_len == 6


def test_a_parent_inherits_the_recency_of_its_evicted_child():
    cache = hybrid()
    serve(cache, ids("old"), [3])
    serve(cache, ids("old", "young"), [8])
    serve(cache, ids("xther"), [5])
    cache.touch(cache.match(ids("old", "young", "!")))
    handle = cache.lock(cache.match(ids("xther!")).node)
    cache.evict(num_tokens=1)
    cache.unlock(handle)
    assert cache.match(ids("old", "young", "!")).kv_match_len == 3
    cache.evict(num_tokens=1)
    assert cache.match(ids("xther!")).kv_match_len == 0, (
        "'xther' is older than the last use of 'old' through its child"
    )
    assert cache.match(ids("old!")).cached_len == 3


def test_a_use_counts_for_a_node_that_became_a_leaf():
    cache = hybrid()
    serve(cache, ids("old", "leaf"), [3, 7])
    serve(cache, ids("xther"), [5])
    cache.evict(num_tokens=1)
    assert cache.match(ids("old", "leaf")).kv_match_len == 3
    cache.touch(cache.match(ids("old!")))
    cache.evict(num_tokens=1)
    assert cache.match(ids("xther!")).kv_match_len == 0
    assert cache.match(ids("old!")).cached_len == 3


def test_the_least_recently_used_checkpoint_is_evicted_first():
    cache = hybrid()
    for prompt in ("one", "two", "six"):
        serve(cache, ids(prompt), [3])
    cache.touch(cache.match(ids("one!")))
    assert cache.evict(num_slots=1) == (3, 1)
    assert cache.match(ids("two!")).kv_match_len == 0
    assert cache.match(ids("one!")).cached_len == 3


def test_kv_with_a_new_checkpoint_is_no_longer_unreachable():
    cache = hybrid()
    serve(cache, ids("alive"), [5])
    serve(cache, ids("later"))
    serve(cache, ids("later"), [5])
    cache.evict(num_tokens=1)
    assert cache.match(ids("alive!")).kv_match_len == 0
    assert cache.match(ids("later!")).cached_len == 5


def test_a_locked_node_without_a_state_outlives_its_children():
    cache = hybrid()
    handle = cache.lock(publish(cache, ids("ab")).node)
    publish(cache, ids("abcd"), [4])
    assert cache.evict(num_tokens=10) == (2, 1)
    assert cache.match(ids("abX")).kv_match_len == 2
    cache.unlock(handle)
    assert cache.evict(num_tokens=10) == (2, 0)


@pytest.mark.parametrize("eviction", ["lru", "sieve"])
def test_unreachable_kv_is_evicted_first(eviction):
    cache = hybrid(eviction=eviction)
    serve(cache, ids("alive"), [5])
    serve(cache, ids("dead!"))
    cache.touch(cache.match(ids("dead!!")))
    cache.evict(num_tokens=1)
    assert cache.match(ids("dead!!")).kv_match_len == 0
    assert cache.match(ids("alive!")).cached_len == 5


def test_only_the_tail_after_the_deepest_checkpoint_is_evicted_first():
    cache = hybrid()
    serve(cache, ids("aabb"), [2])
    assert cache.evict(num_tokens=1) == (2, 0)
    assert cache.match(ids("aabb")).cached_len == 2


def test_without_dead_first_only_recency_decides():
    cache = hybrid(dead_first=False)
    serve(cache, ids("alive"), [5])
    serve(cache, ids("dead!"))
    cache.evict(num_tokens=1)
    assert cache.match(ids("alive!")).kv_match_len == 0


@pytest.mark.parametrize("eviction", ["lru", "sieve"])
def test_a_superseded_checkpoint_is_evicted_before_an_older_one(eviction):
    cache = hybrid(eviction=eviction)
    serve(cache, ids("older"), [5])
    serve(cache, ids("chat"), [4])
    serve(cache, ids("chat", "chat"), [8])
    cache.evict(num_slots=1)
    assert cache.match(ids("older!")).cached_len == 5
    assert cache.match(ids("chatX")).cached_len == 0
    assert cache.match(ids("chatchat!")).cached_len == 8


def test_a_skipped_locked_checkpoint_can_be_evicted_after_unlocking():
    cache = hybrid()
    serve(cache, ids("chat"), [4])
    node = cache.match(ids("chat!")).node
    handle = cache.lock(node)
    assert cache.evict(num_slots=1).num_slots == 0
    serve(cache, ids("chat", "chat"), [8])
    assert node.checkpoint.superseded
    cache.check(held_tokens=0, held_slots=0)
    cache.unlock(handle)
    assert cache.evict(num_slots=1).num_slots == 1
    assert cache.match(ids("chatchat!")).cached_len == 8
    assert node.checkpoint is None


def test_a_parent_inherits_the_uses_of_an_evicted_leaf():
    cache = hybrid()
    serve(cache, ids("chat"), [4])
    serve(cache, ids("chat", "more"), [8])
    for _ in range(3):
        cache.touch(cache.match(ids("chatmore!")))
    parent = cache.match(ids("chatX")).node
    before = parent.kv.uses
    cache.evict(num_tokens=1)
    assert parent.kv.uses == before + 3


def test_a_superseded_checkpoint_is_demoted_but_not_deleted():
    cache = hybrid()
    serve(cache, ids("chat"), [4])
    serve(cache, ids("chat", "chat"), [8])
    assert cache.match(ids("chat", "X")).cached_len == 4


def test_without_demotion_only_recency_decides():
    cache = hybrid(demote_superseded=False)
    serve(cache, ids("older"), [5])
    serve(cache, ids("chat"), [4])
    serve(cache, ids("chat", "chat"), [8])
    cache.evict(num_slots=1)
    assert cache.match(ids("older!")).cached_len == 0
    assert cache.match(ids("chatX")).cached_len == 4


def test_a_fork_removes_the_demotion_and_its_eviction_restores_it():
    cache = hybrid()
    serve(cache, ids("chat"), [4])
    serve(cache, ids("chat", "one"), [7])
    checkpoint = cache.match(ids("chatX")).node.checkpoint
    assert checkpoint.superseded
    serve(cache, ids("chat", "two"), [7])
    assert not checkpoint.superseded
    cache.evict(num_tokens=3)
    assert checkpoint.superseded
    cache.evict(num_tokens=3)
    assert not checkpoint.superseded


def test_a_hit_refreshes_only_the_checkpoint_it_resumes_from():
    cache = hybrid(demote_superseded=False)
    serve(cache, ids("ab"), [2])
    serve(cache, ids("ab", "cd"), [4])
    serve(cache, ids("other"), [5])
    cache.touch(cache.match(ids("abcd!")))
    cache.evict(num_slots=1)
    assert cache.match(ids("abX")).cached_len == 0, "'ab' was used long before 'other'"
    assert cache.match(ids("other!")).cached_len == 5


def test_an_insert_does_not_refresh_checkpoints_on_its_path():
    cache = hybrid()
    for prompt in ("ab", "xy"):
        serve(cache, ids(prompt), [2])
    passed = cache.match(ids("ab!")).resumed
    before = (passed.last_used, passed.uses)
    publish(cache, ids("abcd"))
    publish(cache, ids("ab"))
    assert (passed.last_used, passed.uses) == before
    cache.evict(num_slots=1)
    assert cache.match(ids("xy!")).cached_len == 2
    assert cache.match(ids("ab!")).cached_len == 0, (
        "'ab' is older; the later inserts must not count as uses"
    )


def test_a_chat_with_more_turns_than_slots_keeps_its_latest_turns():
    cache, turn = hybrid(num_slots=48), 5
    chat = ids(range(100 * turn))
    for end in range(turn, len(chat) + 1, turn):
        match = serve(cache, chat[:end], [end])
        assert match.cached_len == end - turn, "a turn does not resume from the previous one"
    assert cache.num_checkpoints == 48 and cache.stats.evicted_slots == 52
    assert cache.cached_tokens == len(chat), "KV was evicted too"
    for end in range(turn, len(chat), turn):
        edited = cache.match(ids(chat[:end].tolist(), "!"))
        is_kept = end > len(chat) - 48 * turn
        assert edited.cached_len == (end if is_kept else 0)
        assert edited.losses.checkpoint_evicted == (0 if is_kept else end)


def test_evicting_an_inner_checkpoint_leaves_a_tombstone():
    cache = hybrid()
    serve(cache, ids("ab"), [2])
    serve(cache, ids("ab", "cd"), [4])
    assert cache.evict(num_slots=1) == (0, 1)
    match = cache.match(ids("abX"))
    assert (match.cached_len, match.kv_match_len) == (0, 2)
    assert match.losses.checkpoint_evicted == 2
    assert cache.match(ids("abcd!")).cached_len == 4


def test_a_tombstone_gets_a_new_checkpoint_from_a_later_request():
    cache = hybrid()
    serve(cache, ids("ab"), [2])
    serve(cache, ids("ab", "cd"), [4])
    cache.evict(num_slots=1)
    result = publish(cache, ids("ab"), [2])
    assert result.rejected_slots == ()
    match = cache.match(ids("abX"))
    assert match.cached_len == 2 and match.missed is None


def test_evicting_the_last_checkpoint_of_a_leaf_frees_its_tail():
    cache = hybrid()
    serve(cache, ids("ab"), [2])
    serve(cache, ids("ab", "cdef"), [6])
    serve(cache, ids("zz"), [2])
    assert cache.evict(num_slots=2) == (6, 2)
    assert cache.match(ids("abcdef!")).kv_match_len == 0
    assert cache.match(ids("zz!")).cached_len == 2


def test_a_cascading_eviction_stops_at_checkpoints_forks_and_locks():
    for stop in ("checkpoint", "fork", "lock"):
        cache = hybrid()
        serve(cache, ids("ab"), [2])
        serve(cache, ids("ab", "cd"), [4])
        serve(cache, ids("ab", "cd", "ef"), [6])
        if stop == "fork":
            serve(cache, ids("ab", "cd", "XY"), [6])
        handle = cache.lock(cache.match(ids("abcd!")).node)
        cache.evict(num_slots=1)
        if stop != "lock":
            cache.unlock(handle)
        leaf = cache.match(ids("abcdef!"))
        assert leaf.cached_len == 6
        cache._drop_leaf(leaf.node)
        cache.check(held_tokens=0, held_slots=0)
        assert cache.match(ids("abcdef!")).kv_match_len == 4


def test_a_chain_of_tombstones_is_evicted_with_its_leaf():
    cache = hybrid(num_slots=20)
    for length in range(2, 22, 2):
        serve(cache, ids(range(length)), [length])
    cache.evict(num_slots=9)
    assert cache.cached_tokens == 20 and cache.num_checkpoints == 1
    assert cache.evict(num_slots=1) == (20, 1)
    assert cache.num_checkpoints == 0


def test_eviction_reports_exactly_the_freed_rows_and_slots():
    cache = hybrid()
    for prompt in ("system one", "system two", "other"):
        serve(cache, ids(prompt), [7, len(prompt)] if len(prompt) > 7 else [5])
    rows, slots = cache._pages.num_free, cache._slots.num_free
    for _ in range(4):
        eviction = cache.evict(num_tokens=1, num_slots=1)
        assert cache._pages.num_free - rows == eviction.num_tokens
        assert cache._slots.num_free - slots == eviction.num_slots
        rows, slots = cache._pages.num_free, cache._slots.num_free


def test_a_prompt_can_be_cached_again_after_full_eviction():
    cache = hybrid()
    serve(cache, ids("hello"), [5])
    cache.evict(num_tokens=100)
    assert cache.match(ids("hello!")).kv_match_len == 0
    serve(cache, ids("hello"), [5])
    assert cache.match(ids("hello!")).cached_len == 5
