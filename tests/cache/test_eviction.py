"""What goes, in what order, and what stays: one behaviour a test."""

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


def test_everything_unlocked_can_go():
    cache = hybrid()
    for prompt in ("one", "two", "three", "two four"):
        publish(cache, ids(prompt), [len(prompt)])
    cache.evict(num_tokens=1000)
    assert cache.cached_tokens == 0 and cache.num_checkpoints == 0
    cache.check(held_tokens=0, held_slots=0)


def test_the_least_recently_used_goes_first():
    cache = hybrid()
    for prompt in ("one", "two", "six"):
        serve(cache, ids(prompt), [3])
    cache.touch(cache.match(ids("one!")))
    cache.evict(num_tokens=3)
    assert cache.match(ids("two!")).kv_match_len == 0
    cache.evict(num_tokens=3)
    assert cache.match(ids("six!")).kv_match_len == 0
    assert cache.match(ids("one!")).cached_len == 3


def test_leaves_go_before_what_they_share():
    cache = hybrid()
    serve(cache, ids("system", "one"), [6, 9])
    serve(cache, ids("system", "two"), [9])
    cache.evict(num_tokens=3)
    assert cache.match(ids("system", "two", "!")).cached_len == 9
    assert cache.match(ids("system", "one")).cached_len == 6
    cache.evict(num_tokens=3)
    assert cache.match(ids("system", "one")).cached_len == 6


def test_recency_is_handed_up_when_a_child_goes():
    cache = hybrid()
    serve(cache, ids("old"), [3])
    serve(cache, ids("old", "young"), [8])
    serve(cache, ids("xther"), [5])
    cache.touch(cache.match(ids("old", "young", "!")))
    receipt = cache.lock(cache.match(ids("xther!")).node)
    cache.evict(num_tokens=1)
    cache.unlock(receipt)
    assert cache.match(ids("old", "young", "!")).kv_match_len == 3
    cache.evict(num_tokens=1)
    assert cache.match(ids("xther!")).kv_match_len == 0, "older than the last use through 'old'"
    assert cache.match(ids("old!")).cached_len == 3


def test_a_use_counts_for_what_became_a_leaf_by_an_eviction():
    cache = hybrid()
    serve(cache, ids("old", "leaf"), [3, 7])
    serve(cache, ids("xther"), [5])
    cache.evict(num_tokens=1)
    assert cache.match(ids("old", "leaf")).kv_match_len == 3
    cache.touch(cache.match(ids("old!")))
    cache.evict(num_tokens=1)
    assert cache.match(ids("xther!")).kv_match_len == 0
    assert cache.match(ids("old!")).cached_len == 3


def test_the_least_recently_used_checkpoint_goes_first():
    cache = hybrid()
    for prompt in ("one", "two", "six"):
        serve(cache, ids(prompt), [3])
    cache.touch(cache.match(ids("one!")))
    assert cache.evict(num_slots=1) == (3, 1)
    assert cache.match(ids("two!")).kv_match_len == 0
    assert cache.match(ids("one!")).cached_len == 3


def test_kv_that_a_later_checkpoint_revived_is_not_dead_any_more():
    cache = hybrid()
    serve(cache, ids("alive"), [5])
    serve(cache, ids("later"))
    serve(cache, ids("later"), [5])
    cache.evict(num_tokens=1)
    assert cache.match(ids("alive!")).kv_match_len == 0
    assert cache.match(ids("later!")).cached_len == 5


def test_a_locked_node_without_a_state_outlives_what_is_below_it():
    cache = hybrid()
    receipt = cache.lock(publish(cache, ids("ab")).node)
    publish(cache, ids("abcd"), [4])
    assert cache.evict(num_tokens=10) == (2, 1)
    assert cache.match(ids("abX")).kv_match_len == 2
    cache.unlock(receipt)
    assert cache.evict(num_tokens=10) == (2, 0)


@pytest.mark.parametrize("eviction", ["lru", "slru"])
def test_kv_that_nothing_can_resume_from_goes_first(eviction):
    cache = hybrid(eviction=eviction)
    serve(cache, ids("alive"), [5])
    serve(cache, ids("dead!"))
    cache.touch(cache.match(ids("dead!!")))
    cache.evict(num_tokens=1)
    assert cache.match(ids("dead!!")).kv_match_len == 0
    assert cache.match(ids("alive!")).cached_len == 5


def test_the_tail_below_the_deepest_checkpoint_goes_first_and_alone():
    cache = hybrid()
    serve(cache, ids("aabb"), [2])
    assert cache.evict(num_tokens=1) == (2, 0)
    assert cache.match(ids("aabb")).cached_len == 2


def test_without_dead_first_recency_alone_decides():
    cache = hybrid(dead_first=False)
    serve(cache, ids("alive"), [5])
    serve(cache, ids("dead!"))
    cache.evict(num_tokens=1)
    assert cache.match(ids("alive!")).kv_match_len == 0


@pytest.mark.parametrize("eviction", ["lru", "slru"])
def test_a_superseded_checkpoint_goes_before_an_older_one_that_is_not(eviction):
    cache = hybrid(eviction=eviction)
    serve(cache, ids("older"), [5])
    serve(cache, ids("chat"), [4])
    serve(cache, ids("chat", "chat"), [8])
    cache.evict(num_slots=1)
    assert cache.match(ids("older!")).cached_len == 5
    assert cache.match(ids("chatX")).cached_len == 0
    assert cache.match(ids("chatchat!")).cached_len == 8


def test_a_locked_checkpoint_that_was_passed_over_can_be_superseded_and_freed_again():
    cache = hybrid()
    serve(cache, ids("chat"), [4])
    node = cache.match(ids("chat!")).node
    receipt = cache.lock(node)
    assert cache.evict(num_slots=1).num_slots == 0
    serve(cache, ids("chat", "chat"), [8])
    assert node.checkpoint.superseded
    cache.check(held_tokens=0, held_slots=0)
    cache.unlock(receipt)
    assert cache.evict(num_slots=1).num_slots == 1
    assert cache.match(ids("chatchat!")).cached_len == 8
    assert node.checkpoint is None


def test_uses_of_a_leaf_that_goes_are_its_parents():
    cache = hybrid()
    serve(cache, ids("chat"), [4])
    serve(cache, ids("chat", "more"), [8])
    for _ in range(3):
        cache.touch(cache.match(ids("chatmore!")))
    parent = cache.match(ids("chatX")).node
    before = parent.kv.uses
    cache.evict(num_tokens=1)
    assert parent.kv.uses == before + 3


def test_a_superseded_checkpoint_is_demoted_not_deleted():
    cache = hybrid()
    serve(cache, ids("chat"), [4])
    serve(cache, ids("chat", "chat"), [8])
    assert cache.match(ids("chat", "X")).cached_len == 4


def test_without_demotion_recency_alone_decides():
    cache = hybrid(demote_superseded=False)
    serve(cache, ids("older"), [5])
    serve(cache, ids("chat"), [4])
    serve(cache, ids("chat", "chat"), [8])
    cache.evict(num_slots=1)
    assert cache.match(ids("older!")).cached_len == 0
    assert cache.match(ids("chatX")).cached_len == 4


def test_a_fork_lifts_the_demotion_and_its_end_restores_it():
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


def test_a_hit_refreshes_only_the_checkpoint_it_consumed():
    cache = hybrid(demote_superseded=False)
    serve(cache, ids("ab"), [2])
    serve(cache, ids("ab", "cd"), [4])
    serve(cache, ids("other"), [5])
    cache.touch(cache.match(ids("abcd!")))
    cache.evict(num_slots=1)
    assert cache.match(ids("abX")).cached_len == 0, "used long before 'other'"
    assert cache.match(ids("other!")).cached_len == 5


def test_an_insert_refreshes_no_checkpoint_that_it_merely_passes():
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
    assert cache.match(ids("ab!")).cached_len == 0, "the older one, whoever wrote past it since"


def test_a_chat_with_more_turns_than_slots_keeps_its_latest_turns():
    cache, turn = hybrid(num_slots=48), 5
    chat = ids(range(100 * turn))
    for end in range(turn, len(chat) + 1, turn):
        match = serve(cache, chat[:end], [end])
        assert match.cached_len == end - turn, "each turn goes on from the one before"
    assert cache.num_checkpoints == 48 and cache.stats.evicted_slots == 52
    assert cache.cached_tokens == len(chat), "only states went"
    for end in range(turn, len(chat), turn):
        edited = cache.match(ids(chat[:end].tolist(), "!"))
        kept = end > len(chat) - 48 * turn
        assert edited.cached_len == (end if kept else 0)
        assert edited.losses.checkpoint_evicted == (0 if kept else end)


def test_evicting_an_inner_checkpoint_leaves_a_tombstone():
    cache = hybrid()
    serve(cache, ids("ab"), [2])
    serve(cache, ids("ab", "cd"), [4])
    assert cache.evict(num_slots=1) == (0, 1)
    match = cache.match(ids("abX"))
    assert (match.cached_len, match.kv_match_len) == (0, 2)
    assert match.losses.checkpoint_evicted == 2
    assert cache.match(ids("abcd!")).cached_len == 4


def test_a_tombstone_is_filled_by_a_later_pass():
    cache = hybrid()
    serve(cache, ids("ab"), [2])
    serve(cache, ids("ab", "cd"), [4])
    cache.evict(num_slots=1)
    result = publish(cache, ids("ab"), [2])
    assert result.rejected_slots == ()
    match = cache.match(ids("abX"))
    assert match.cached_len == 2 and match.missed is None


def test_evicting_the_last_checkpoint_under_a_leaf_frees_the_tail_with_it():
    cache = hybrid()
    serve(cache, ids("ab"), [2])
    serve(cache, ids("ab", "cdef"), [6])
    serve(cache, ids("zz"), [2])
    assert cache.evict(num_slots=2) == (6, 2)
    assert cache.match(ids("abcdef!")).kv_match_len == 0
    assert cache.match(ids("zz!")).cached_len == 2


def test_the_cascade_stops_at_a_checkpoint_a_fork_and_a_lock():
    for stop in ("checkpoint", "fork", "lock"):
        cache = hybrid()
        serve(cache, ids("ab"), [2])
        serve(cache, ids("ab", "cd"), [4])
        serve(cache, ids("ab", "cd", "ef"), [6])
        if stop == "fork":
            serve(cache, ids("ab", "cd", "XY"), [6])
        receipt = cache.lock(cache.match(ids("abcd!")).node)
        cache.evict(num_slots=1)
        if stop != "lock":
            cache.unlock(receipt)
        leaf = cache.match(ids("abcdef!"))
        assert leaf.cached_len == 6
        cache._residency._drop_leaf(leaf.node)
        cache.check(held_tokens=0, held_slots=0)
        assert cache.match(ids("abcdef!")).kv_match_len == 4


def test_a_chain_of_tombstones_goes_with_its_leaf():
    cache = hybrid(num_slots=20)
    for length in range(2, 22, 2):
        serve(cache, ids(range(length)), [length])
    cache.evict(num_slots=9)
    assert cache.cached_tokens == 20 and cache.num_checkpoints == 1
    assert cache.evict(num_slots=1) == (20, 1)
    assert cache.num_checkpoints == 0


def test_eviction_says_exactly_what_the_pools_got_back():
    cache = hybrid()
    for prompt in ("system one", "system two", "other"):
        serve(cache, ids(prompt), [7, len(prompt)] if len(prompt) > 7 else [5])
    rows, slots = cache._pages.num_free, cache._slots.num_free
    for _ in range(4):
        eviction = cache.evict(num_tokens=1, num_slots=1)
        assert cache._pages.num_free - rows == eviction.num_tokens
        assert cache._slots.num_free - slots == eviction.num_slots
        rows, slots = cache._pages.num_free, cache._slots.num_free


def test_a_prompt_comes_back_after_everything_was_evicted():
    cache = hybrid()
    serve(cache, ids("hello"), [5])
    cache.evict(num_tokens=100)
    assert cache.match(ids("hello!")).kv_match_len == 0
    serve(cache, ids("hello"), [5])
    assert cache.match(ids("hello!")).cached_len == 5
