"""What a policy sees of an item does not depend on where the tree happens to be split."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcache.hybrid import HybridRadixCache
from hybridcache.policies.registry import EVICTION
from hybridcache.radix.tree import RadixNode
from tests.cache.serving import hybrid, ids, serve, traffic
from tests.cache.twins import VictimLog


def filled(eviction: str, seed: int, tiers: bool) -> HybridRadixCache:
    cache = hybrid(600, 12, eviction=eviction, dead_first=tiers, demote_superseded=tiers)
    for tokens in traffic(seed, 25):
        serve(cache, tokens, {len(tokens) // 2, len(tokens)} - {0})
    return cache


def splittable(cache: HybridRadixCache) -> list[RadixNode]:
    return [n for n in cache._tree.nodes() if n.kv is not None and n.end - n.start > 1]


def order(cache: HybridRadixCache) -> list[object]:
    """What goes, in order, until nothing is left."""
    log = VictimLog()
    cache.subscribe(log)
    cache.reset()
    return log.chosen_items


@pytest.mark.full("arc", "class-age", "gdsf", "lru", "marconi", "survival", "w-tinylfu")
@pytest.mark.parametrize("word", sorted(EVICTION))
@settings(max_examples=25)
@given(st.integers(0, 50), st.booleans(), st.lists(st.integers(0, 10**6), min_size=1, max_size=6))
def test_a_split_that_stores_nothing_changes_no_order(
    word: str, seed: int, tiers: bool, cuts: list[int]
) -> None:
    whole, split = filled(word, seed, tiers), filled(word, seed, tiers)
    for cut in cuts:
        nodes = splittable(split)
        node = nodes[cut % len(nodes)]
        split._residency.split(node, node.start + 1 + cut % (node.end - node.start - 1))
    split.check()
    assert order(split) == order(whole)


def test_a_fork_that_came_and_went_leaves_no_trace() -> None:
    cache = hybrid(2000, 10)
    serve(cache, ids(range(1000)), [1000])
    leaf = cache.match(ids(range(1001))).node
    before = [(item.span, item.size_bytes) for item in (leaf.kv, leaf.checkpoint)]
    serve(cache, ids(range(990), range(5000, 5010)))
    assert cache.evict(num_tokens=1).num_tokens == 10
    assert leaf.start == 990
    assert [(item.span, item.size_bytes) for item in (leaf.kv, leaf.checkpoint)] == before


def test_what_a_leafs_kv_loses_is_what_its_checkpoint_loses() -> None:
    """They go together, whichever is chosen; a fork above them keeps its rows and has to be
    computed again all the same."""
    cache = hybrid(2000, 10)
    serve(cache, ids(range(400)), [100, 400])
    serve(cache, ids(range(300), range(5000, 5010)), [310])
    leaf = cache.match(ids(range(401))).node
    assert leaf.start == 300 and leaf.kv.span == leaf.checkpoint.span == 300
    assert leaf.kv.size_bytes == leaf.checkpoint.size_bytes == 100 + 2


def test_where_there_are_no_states_kv_loses_its_own_tokens() -> None:
    cache = hybrid(2000, 0, prefix_cache="radix")
    serve(cache, ids(range(400)))
    serve(cache, ids(range(300), range(5000, 5010)))
    assert [item.span for item in cache._residency.candidates()] == [100, 10]
