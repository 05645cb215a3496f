"""One example per rule of the cache, for readers.

``tests/plain_cache.py`` states all rules, and the state machines compare every operation with it.
"""

from __future__ import annotations

import numpy as np
import pytest

from hybridcache import CacheConfig, build_prefix_cache
from tests.cache.serving import hybrid, ids, publish, serve


def test_a_prompt_resumes_from_the_checkpoint_of_an_earlier_one():
    cache = hybrid()
    result = publish(cache, ids("hello"), [5])
    match = cache.match(ids("hello", " world"))
    assert (match.cached_len, match.kv_match_len, match.seen_len) == (5, 5, 5)
    assert match.checkpoint is not None
    assert cache.gather(match.node).tolist() == cache.gather(result.node).tolist()


def test_kv_without_a_checkpoint_is_not_reusable():
    cache = hybrid()
    publish(cache, ids("hello"))
    match = cache.match(ids("hello", "!"))
    assert (match.cached_len, match.kv_match_len) == (0, 5)
    assert match.losses.never_checkpointed == 5


def test_a_fork_inside_an_edge_splits_it_and_keeps_both_sides():
    cache = hybrid()
    serve(cache, ids("system", "one"), [9])
    serve(cache, ids("system", "two"), [9])
    assert cache.num_nodes == 3
    assert cache.match(ids("system", "one", "!")).cached_len == 9
    assert cache.match(ids("system", "two", "!")).cached_len == 9
    assert cache.match(ids("system", "xxx")).kv_match_len == 6


def test_a_split_copies_no_tokens():
    cache = hybrid()
    publish(cache, ids("abcdef"))
    (node,) = cache._tree.nodes()
    whole = node.edge
    publish(cache, ids("abcX"))
    upper = node.parent
    assert upper.edge.obj is whole and node.edge.obj is whole
    assert np.shares_memory(upper.kv.indices, node.kv.indices.base)


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


def test_match_changes_nothing():
    cache = hybrid()
    publish(cache, ids("hello world"), [5, 11])
    before = cache.render()
    for prompt in ("hello", "help", "hello world", "hello w", "bye"):
        cache.match(ids(prompt))
    assert cache.render() == before
    assert cache.stats.total.requests == 0


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


def test_a_ghost_gives_no_hit_but_a_seen_len():
    cache = hybrid()
    serve(cache, ids("hello world"), [5, 11])
    cache.evict(num_tokens=100)
    match = cache.match(ids("hello wonder"))
    assert (match.cached_len, match.kv_match_len, match.seen_len) == (0, 0, 8)
    assert match.losses.kv_evicted == 8 and match.losses.never_seen == 4
    assert cache.ghost_tokens == 11


@pytest.mark.parametrize("ghost_bytes", [0, 1000])
def test_ghosts_never_exceed_their_byte_limit(ghost_bytes):
    cache = hybrid(ghost_bytes=ghost_bytes)
    for number in range(100):
        serve(cache, ids([number], "x" * number), [number + 1])
        assert cache.ghosts.num_bytes <= ghost_bytes


def test_a_null_cache_stores_nothing():
    cache = build_prefix_cache(
        CacheConfig(prefix_cache="none", num_kv_tokens=100, num_slots=2, grid=1)
    )
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
