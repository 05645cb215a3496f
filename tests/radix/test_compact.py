"""Host memory follows what is cached, not what once was."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
import pytest

from hybridcache.radix.ghosts import GHOST_NODE_BYTES
from tests.cache.serving import hybrid, ids, publish

TAIL = 5_000


def long_tails(cache, num_prompts):
    """Prompts with states at 10 and 20 and a long tail behind them, none of whose tails stays."""
    tail = ids(range(TAIL))
    for number in range(num_prompts):
        prompt = np.concatenate([ids([number]), tail])
        publish(cache, prompt)
        publish(cache, prompt[:20], [10, 20])  # splits what was whole
        cache.evict(num_tokens=1)


@pytest.mark.full("100000")
@pytest.mark.parametrize("ghost_bytes", [0, 100_000])
def test_short_survivors_do_not_keep_their_long_tails_alive(ghost_bytes):
    cache = hybrid(num_kv_tokens=9_500, num_slots=600, ghost_bytes=ghost_bytes)
    long_tails(cache, 5)
    gc.collect()
    tracemalloc.start()
    long_tails(cache, 80)
    gc.collect()
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    cache.check(held_tokens=0, held_slots=0)
    assert cache.cached_tokens >= 80 * 20
    cut_node_bytes = 1400  # a node cut by a split holds two views besides what a whole one does
    allowed = 12 * cache.cached_tokens + cut_node_bytes * cache.num_nodes + 2 * ghost_bytes
    assert used < allowed, f"{used} bytes for {cache.cached_tokens} tokens"


def test_rows_and_tokens_are_the_same_after_they_moved():
    cache = hybrid(num_kv_tokens=6_000, ghost_bytes=0)
    prompt = ids(range(TAIL))
    publish(cache, prompt)
    result = publish(cache, prompt[:30], [10, 20, 30])
    rows = cache.gather(result.node).tolist()
    (top,) = [node for node in cache._tree.nodes() if node.end == 10]
    before = top.edge.obj
    cache.evict(num_tokens=1)
    assert cache.cached_tokens == 30
    assert top.edge.obj is not before and len(top.edge.obj) == 30 * 4
    assert len(top.kv.indices.base) == 30
    match = cache.match(prompt[:31])
    assert match.cached_len == 30
    assert cache.gather(match.node).tolist() == rows
    np.testing.assert_array_equal(match.node.tokens, prompt[20:30])
    cache.check(held_tokens=0, held_slots=0)


@pytest.mark.parametrize("num_living", [49, 50])
def test_a_buffer_is_left_where_it_is_while_half_of_it_is_alive(num_living):
    cache = hybrid(num_kv_tokens=6_000, ghost_bytes=0)
    publish(cache, ids(range(100)))
    publish(cache, ids(range(num_living)), [num_living])
    (top,) = [node for node in cache._tree.nodes() if node.end == num_living]
    base, whole = top.kv.indices.base, top.edge.obj
    cache.evict(num_tokens=1)
    is_left = num_living == 50
    assert (top.kv.indices.base is base) == (top.edge.obj is whole) == is_left
    assert len(top.kv.indices.base) == (100 if is_left else 49)


def test_nodes_that_end_at_checkpoints_from_the_start_share_nothing():
    cache = hybrid(num_kv_tokens=6_000, num_slots=8)
    publish(cache, ids(range(100)), [80, 30, 55])
    nodes = sorted(cache._tree.nodes(), key=lambda node: node.end)
    assert [node.end for node in nodes] == [30, 55, 80, 100]
    assert all(type(node.edge) is bytes and node.kv.indices.base is None for node in nodes)
    cache.check(held_tokens=0, held_slots=0)


def test_the_weight_of_a_ghost_node_is_what_it_takes():
    cache = hybrid(num_kv_tokens=100_000, num_slots=2_000, ghost_bytes=1 << 30)
    publish(cache, ids("warm"), [4])
    gc.collect()
    tracemalloc.start()
    for number in range(400):
        publish(cache, ids([1000 + number], range(50)), [51])
    cache.evict(num_tokens=100_000)
    gc.collect()
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    per_node = used / 400 - 51 * 4
    assert 0.7 * GHOST_NODE_BYTES < per_node < 1.3 * GHOST_NODE_BYTES
