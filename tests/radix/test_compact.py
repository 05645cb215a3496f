"""Compaction: the tree's memory is proportional to the resident tokens, not to evicted ones."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
import pytest

from hybridcache.radix.tree import GHOST_NODE_BYTES
from tests.radix.serving import hybrid, ids, publish

TAIL = 5_000


def publish_and_evict_tails(cache, num_prompts):
    """Publish prompts with checkpoints at 10 and 20 and evict the long tail behind them."""
    tail = ids(range(TAIL))
    for number in range(num_prompts):
        prompt = np.concatenate([ids([number]), tail])
        publish(cache, prompt)
        publish(cache, prompt[:20], [10, 20])  # splits the node of the whole prompt
        cache.evict(num_tokens=1)


@pytest.mark.full("100000")
@pytest.mark.parametrize("ghost_bytes", [0, 100_000])
def test_short_nodes_do_not_hold_the_memory_of_evicted_tails(ghost_bytes):
    cache = hybrid(num_kv_tokens=9_500, num_slots=600, ghost_bytes=ghost_bytes)
    publish_and_evict_tails(cache, 5)
    gc.collect()
    tracemalloc.start()
    publish_and_evict_tails(cache, 80)
    gc.collect()
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    cache.check(held_tokens=0, held_slots=0)
    assert cache.cached_tokens >= 80 * 20
    allowed = 12 * cache.cached_tokens + 1000 * cache.num_nodes + 2 * ghost_bytes
    assert used < allowed, f"{used} bytes for {cache.cached_tokens} tokens"


def test_nodes_share_no_buffer():
    cache = hybrid(num_kv_tokens=6_000, num_slots=8)
    publish(cache, ids(range(100)), [80, 30, 55])
    publish(cache, ids(range(100)), [45])  # splits a node
    nodes = sorted(cache._tree.nodes(), key=lambda node: node.end)
    assert [node.end for node in nodes] == [30, 45, 55, 80, 100]
    assert all(type(node.edge) is type(node.kv.rows) is bytes for node in nodes)
    cache.check(held_tokens=0, held_slots=0)


def test_the_constant_for_ghost_node_bytes_matches_measured_memory():
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
