"""Behaviour of the hybrid cache at its public methods, one case per test."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cache.serving import (
    hybrid,
    ids,
    publish,
    serve,
)


def test_a_prompt_resumes_from_the_checkpoint_of_an_earlier_one():
    cache = hybrid()
    result = publish(cache, ids("hello"), [5])
    match = cache.match(ids("hello", " world"))
    assert (match.cached_len, match.kv_match_len, match.seen_len) == (5, 5, 5)
    assert match.checkpoint is not None
    assert cache.gather(match.node).tolist() == cache.gather(result.node).tolist()


def test_an_empty_cache_returns_no_match():
    match = hybrid().match(ids("hello"))
    assert match.cached_len == 0 and match.checkpoint is None
    assert match.losses.never_seen == 5
    assert len(hybrid().gather(match.node)) == 0


def test_an_empty_prompt_can_be_matched_and_inserted():
    cache = hybrid()
    serve(cache, ids("hello"), [5])
    match = cache.match(ids())
    assert match.cached_len == 0 and sum(match.losses) == 0
    assert publish(cache, ids()).inserted_len == 0
    cache.check(held_tokens=0, held_slots=0)


def test_kv_without_a_checkpoint_is_not_reusable():
    cache = hybrid()
    publish(cache, ids("hello"))
    match = cache.match(ids("hello", "!"))
    assert (match.cached_len, match.kv_match_len) == (0, 5)
    assert match.losses.never_checkpointed == 5


def test_the_last_token_is_never_reused():
    cache = hybrid()
    publish(cache, ids("hello"), [4, 5])
    assert cache.match(ids("hello")).cached_len == 4
    assert cache.match(ids("hello!")).cached_len == 5


def test_match_changes_nothing():
    cache = hybrid()
    publish(cache, ids("hello world"), [5, 11])
    before = cache.render()
    for prompt in ("hello", "help", "hello world", "hello w", "bye"):
        cache.match(ids(prompt))
    assert cache.render() == before
    assert cache.stats.total.requests == 0


def test_the_deepest_of_several_checkpoints_is_used():
    cache = hybrid()
    publish(cache, ids("abcdefgh"), [2, 4, 8])
    assert cache.match(ids("abcdefgh")).cached_len == 4
    assert cache.match(ids("abcdefghi")).cached_len == 8
    assert cache.match(ids("abcd")).cached_len == 2
    assert cache.match(ids("abX")).cached_len == 2


def test_token_ids_up_to_the_largest_are_distinguished():
    cache = hybrid()
    top = 2**31 - 1
    publish(cache, ids([top, 0, top]), [3])
    assert cache.match(ids([top, 0, top, 1])).cached_len == 3
    assert cache.match(ids([top, 0, top - 1, 1])).kv_match_len == 2
    assert cache.match(ids([0, 0])).kv_match_len == 0


def test_ids_of_another_type_raise_before_anything_changes():
    cache = hybrid()
    with pytest.raises(ValueError, match="int32"):
        cache.insert(np.arange(4, dtype=np.int64), np.arange(4, dtype=np.int32))
    with pytest.raises(ValueError, match="got 3 for 4 tokens"):
        cache.insert(ids("abcd"), np.arange(3, dtype=np.int32))
    assert cache.num_nodes == 0


def test_a_fork_inside_an_edge_splits_it_and_keeps_both_sides():
    cache = hybrid()
    serve(cache, ids("system", "one"), [9])
    serve(cache, ids("system", "two"), [9])
    assert cache.num_nodes == 3
    assert cache.match(ids("system", "one", "!")).cached_len == 9
    assert cache.match(ids("system", "two", "!")).cached_len == 9
    assert cache.match(ids("system", "xxx")).kv_match_len == 6


def test_a_split_leaves_checkpoint_and_lock_with_the_lower_node():
    cache = hybrid()
    serve(cache, ids("abcdef"), [6])
    match = cache.match(ids("abcdefg"))
    handle = cache.lock(match.node)
    before = cache.gather(match.node).tolist()
    publish(cache, ids("abcX"))
    assert match.node.end == 6 and match.node.locks == 1
    assert match.node.checkpoint.slot == match.checkpoint
    assert cache.gather(match.node).tolist() == before
    assert cache.match(ids("abcdefg")).cached_len == 6
    cache.unlock(handle)
    cache.check(held_tokens=0, held_slots=0)


def test_a_split_copies_no_tokens():
    cache = hybrid()
    publish(cache, ids("abcdef"))
    (node,) = cache._tree.nodes()
    whole = node.edge
    publish(cache, ids("abcX"))
    upper = node.parent
    assert upper.edge.obj is whole and node.edge.obj is whole
    assert np.shares_memory(upper.kv.indices, node.kv.indices.base)


def test_a_fork_at_a_checkpoint_splits_nothing():
    cache = hybrid()
    serve(cache, ids("system"), [6])
    match = serve(cache, ids("system", "one"), [9])
    assert match.cached_len == 6
    serve(cache, ids("system", "two"), [9])
    assert cache.num_nodes == 3


def test_branches_of_one_node_are_independent():
    cache = hybrid(num_slots=30)
    for branch in range(10):
        serve(cache, ids("root", [branch], "leaf"), [4, 9])
    for branch in range(10):
        assert cache.match(ids("root", [branch], "leaf", "!")).cached_len == 9
    assert cache.match(ids("root", [77])).cached_len == 4


def test_a_checkpoint_inside_an_edge_splits_it():
    cache = hybrid()
    publish(cache, ids("abcdef"))
    result = publish(cache, ids("abcdef"), [3])
    assert result.rejected_slots == ()
    assert cache.match(ids("abcdef")).cached_len == 3


def test_a_prompt_that_ends_inside_an_edge_splits_it():
    cache = hybrid()
    publish(cache, ids("abcdef"), [6])
    result = publish(cache, ids("abc"))
    assert result.inserted_len == 3
    assert len(cache.gather(result.node)) == 3


def test_duplicate_rows_are_returned_and_the_tree_keeps_its_rows():
    cache = hybrid()
    first = publish(cache, ids("hello"))
    rows = cache.allocate_kv(7)
    result = cache.insert(ids("hello", "!!"), rows)
    assert result.duplicates.tolist() == rows[:5].tolist()
    assert cache.gather(result.node)[:5].tolist() == cache.gather(first.node).tolist()
    assert cache.gather(result.node)[5:].tolist() == rows[5:].tolist()
    cache.free_kv(result.duplicates)
    cache.check(held_tokens=0, held_slots=0)


def test_the_cache_copies_the_arrays_of_the_caller():
    cache = hybrid()
    rows, tokens = cache.allocate_kv(5), ids("hello")
    given = rows.copy()
    result = cache.insert(tokens, given)
    given[:], tokens[:] = 99, 99
    assert cache.gather(result.node).tolist() == rows.tolist()
    assert cache.match(ids("hello!")).kv_match_len == 5


def test_rows_before_owned_from_are_not_returned_as_duplicates():
    cache = hybrid()
    publish(cache, ids("hello"), [5])
    match = cache.match(ids("hello", "!!"))
    handle = cache.lock(match.node)
    rows = np.concatenate([cache.gather(match.node), cache.allocate_kv(2)])
    result = cache.insert(ids("hello", "!!"), rows, owned_from=match.cached_len)
    assert len(result.duplicates) == 0
    cache.unlock(handle)
    cache.check(held_tokens=0, held_slots=0)


def test_insert_can_start_at_a_locked_node():
    cache = hybrid()
    publish(cache, ids("hello"), [5])
    match = cache.match(ids("hello", "!!"))
    cache.lock(match.node)
    publish(cache, ids("heX"))
    rows = np.concatenate([cache.gather(match.node), cache.allocate_kv(2)])
    result = cache.insert(ids("hello", "!!"), rows, owned_from=5, after=match.node)
    assert cache.gather(result.node).tolist() == rows.tolist()
    cache.check(held_tokens=0, held_slots=0)


def test_insert_raises_if_the_tree_lacks_rows_before_owned_from():
    cache = hybrid()
    with pytest.raises(ValueError, match="keep a lock"):
        cache.insert(ids("hello"), cache.allocate_kv(5), owned_from=3)
    assert cache.num_nodes == 0 and not cache._tree.roots


def test_a_second_state_for_the_same_prefix_is_rejected():
    cache = hybrid()
    publish(cache, ids("hello"), [5])
    kept = cache.match(ids("hello!")).checkpoint
    slot = cache.allocate_slot()
    result = cache.insert(ids("hello"), cache.allocate_kv(5), [(5, slot)])
    assert result.rejected_slots == (slot,)
    assert cache.match(ids("hello!")).checkpoint == kept


def test_states_off_the_grid_or_past_the_end_are_rejected():
    cache = hybrid(grid=4)
    slots = [cache.allocate_slot() for _ in range(5)]
    offered = list(zip((0, 3, 4, 8, 12), slots, strict=True))
    result = cache.insert(ids("abcdefghi"), cache.allocate_kv(9), offered)
    assert sorted(result.rejected_slots) == sorted([slots[0], slots[1], slots[4]])
    assert cache.match(ids("abcdefghij")).cached_len == 8


def test_tokens_past_the_last_whole_page_are_not_inserted():
    cache = hybrid(num_kv_tokens=64, page_size=4)
    rows = cache.allocate_kv(6)
    assert len(rows) == 8
    result = cache.insert(ids("abcdef"), rows[:6])
    assert result.inserted_len == 4
    cache.check(held_tokens=4)
    cache.free_kv(rows[4:])
    cache.check(held_tokens=0)


def test_prompts_fork_only_at_page_boundaries():
    cache = hybrid(num_kv_tokens=64, page_size=4, grid=4)
    publish(cache, ids("aaaabbbbcccc"), [12])
    assert cache.match(ids("aaaabbXbcccc")).kv_match_len == 4
    publish(cache, ids("aaaabbXbcccc"), [12])
    assert cache.match(ids("aaaabbbbcccc!")).cached_len == 12
    assert cache.match(ids("aaaabbXbcccc!")).cached_len == 12
    assert cache.match(ids("aaaabb")).kv_match_len == 4


@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
@pytest.mark.parametrize("grid", [1, 16, 64, 256])
def test_checkpoints_are_accepted_at_multiples_of_grid_and_page(page_size, grid):
    step = max(page_size, grid)
    cache = hybrid(num_kv_tokens=8 * 256, page_size=page_size, grid=grid)
    prompt = ids(range(2 * step + 1))
    result = publish(cache, prompt, [step, step // 2, 2 * step])
    assert len(result.rejected_slots) == 1
    assert cache.match(prompt).cached_len == 2 * step
    assert cache.match(prompt[: 2 * step]).cached_len == step
    cache.check(held_tokens=0, held_slots=0)


def test_namespaces_do_not_share_prefixes():
    cache = hybrid()
    publish(cache, ids("hello"), [5], namespace="a")
    assert cache.match(ids("hello!"), "a").cached_len == 5
    for other in (None, "b", ("a",), 0):
        assert cache.match(ids("hello!"), other).losses.never_seen == 6


def test_the_root_of_an_empty_namespace_is_removed():
    cache = hybrid(ghost_bytes=0)
    for number in range(50):
        publish(cache, ids("hello"), [5], namespace=("salt", number))
    cache.reset()
    assert not cache._tree.roots and cache.num_nodes == 0


def test_a_locked_node_and_its_ancestors_are_not_evicted():
    cache = hybrid()
    publish(cache, ids("ab"), [2])
    publish(cache, ids("abcd"), [4])
    publish(cache, ids("abcdef"), [6])
    handle = cache.lock(cache.match(ids("abcdX")).node)
    cache.evict(num_tokens=100, num_slots=100)
    match = cache.match(ids("abcdX"))
    assert match.cached_len == 4 and match.checkpoint is not None
    assert cache.match(ids("abcdef!")).kv_match_len == 4
    cache.unlock(handle)
    cache.evict(num_tokens=100)
    assert cache.match(ids("abcdX")).kv_match_len == 0


def test_locks_are_counted_and_each_handle_unlocks_once():
    cache = hybrid()
    publish(cache, ids("hello"), [5])
    node = cache.match(ids("hello!")).node
    first, second = cache.lock(node), cache.lock(node)
    cache.unlock(first)
    cache.unlock(first)
    assert cache.evict(num_tokens=5).num_tokens == 0
    cache.unlock(second)
    assert cache.evict(num_tokens=5).num_tokens == 5


def test_eviction_skips_locked_branches():
    cache = hybrid()
    publish(cache, ids("sys", "a"), [4])
    publish(cache, ids("sys", "b"), [4])
    handle = cache.lock(cache.match(ids("sys", "a", "!")).node)
    assert cache.evict(num_tokens=1).num_tokens == 1
    assert cache.match(ids("sys", "b", "!")).kv_match_len == 3
    assert cache.match(ids("sys", "a", "!")).cached_len == 4
    cache.unlock(handle)


def test_the_node_of_a_miss_can_be_locked():
    cache = hybrid()
    match = cache.match(ids("hello"))
    cache.unlock(cache.lock(match.node))
    cache.check(held_tokens=0, held_slots=0)


def test_locks_of_misses_leave_no_lock_counts():
    cache = hybrid()
    publish(cache, ids("hello"), [5])
    for _ in range(50):
        cache.unlock(cache.lock(cache.match(ids("other")).node))
    cache.check()
    assert all(root.locks == 0 for root in cache._tree.roots.values())


def test_a_chain_of_2000_nodes_and_100000_tokens():
    cache = hybrid(num_kv_tokens=110_000, num_slots=2001)
    tokens = ids(range(100_000))
    node, handle = None, None
    rows = cache.allocate_kv(100_000)
    for end in range(50, 100_001, 50):
        slot = cache.allocate_slot()
        result = cache.insert(
            tokens[:end], rows[:end], [(end, slot)], owned_from=end - 50, after=node
        )
        next_handle = cache.lock(result.node)
        if handle is not None:
            cache.unlock(handle)
        node, handle = result.node, next_handle
    assert cache.num_nodes == 2000
    match = cache.match(ids(range(100_000), [7]))
    assert match.cached_len == 100_000
    assert cache.gather(match.node).tolist() == rows.tolist()
    cache.unlock(handle)
    cache.check(held_tokens=0, held_slots=0)
    publish(cache, ids(range(51_000), [7]), [51_001])
    cache.evict(num_slots=1500)
    cache.check(held_tokens=0, held_slots=0)
    cache.reset()
    assert cache.num_nodes == 0


def test_a_prompt_of_70000_tokens_in_pages_of_64():
    cache = hybrid(num_kv_tokens=64 * 1200, page_size=64, grid=64)
    publish(cache, ids(range(70_000)), [64 * 1093])
    assert cache.match(ids(range(70_000))).cached_len == 64 * 1093
