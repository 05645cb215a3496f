"""Attributes of items do not depend on the positions at which the tree is split."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcache.lab.rivals.evictions import ALL_NAMES, make_eviction
from hybridcache.radix.cache import HybridRadixCache
from tests.radix.serving import hybrid, ids, serve, traffic
from tests.radix.twins import VictimLog


def filled(eviction: str, seed: int, classes: bool) -> HybridRadixCache:
    cache = hybrid(600, 12, eviction=make_eviction(eviction), priority_classes=classes)
    for tokens in traffic(seed, 25):
        serve(cache, tokens, {len(tokens) // 2, len(tokens)} - {0})
    return cache


def order(cache: HybridRadixCache) -> list[object]:
    """Return all victims in order, until the cache is empty."""
    log = VictimLog(cache)
    cache.reset()
    return log.chosen_items


@pytest.mark.full("arc", "gdsf", "lru", "marconi", "survival", "w-tinylfu")
@pytest.mark.parametrize("eviction", sorted(ALL_NAMES))
@settings(max_examples=25)
@given(st.integers(0, 50), st.booleans(), st.lists(st.integers(0, 10**6), min_size=1, max_size=6))
def test_a_split_without_an_insert_does_not_change_the_eviction_order(
    eviction: str, seed: int, classes: bool, cuts: list[int]
) -> None:
    whole, split = filled(eviction, seed, classes), filled(eviction, seed, classes)
    for cut in cuts:
        nodes = [n for n in split._tree.nodes() if n.kv is not None and n.end - n.start > 1]
        node = nodes[cut % len(nodes)]
        split._split(node, node.start + 1 + cut % (node.end - node.start - 1))
    split.check()
    assert order(split) == order(whole)


def test_an_evicted_fork_does_not_change_span_or_size() -> None:
    cache = hybrid(2000, 10)
    serve(cache, ids(range(1000)), [1000])
    leaf = cache.match(ids(range(1001))).node
    before = [(item.span, item.size_bytes) for item in (leaf.kv, leaf.checkpoint)]
    serve(cache, ids(range(990), range(5000, 5010)))
    assert cache.evict(num_tokens=1).num_tokens == 10
    assert leaf.start == 990
    assert [(item.span, item.size_bytes) for item in (leaf.kv, leaf.checkpoint)] == before
