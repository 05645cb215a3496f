"""``check`` recomputes every structure and finds each corruption that these tests introduce."""

from __future__ import annotations

import pytest

from hybridcache.policies.registry import EVICTION
from tests.cache.serving import hybrid, ids, publish

LISTING = ("lru", "fifo", "random", "hybridcache.policies.eviction.scored:FIFO")
"""One policy of each base class that can list its candidates."""


def filled(**options):
    """Build a cache with two leaves under a fork and a checkpoint above them."""
    cache = hybrid(**options)
    publish(cache, ids("abcde"), [2, 5])
    publish(cache, ids("abX"), [3])
    cache.check(held_tokens=0, held_slots=0)
    return cache


def leaf_of(cache):
    return cache.match(ids("abcdef")).node


@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("eviction", LISTING)
def test_check_finds_missing_and_extra_candidates(eviction, classes):
    for item_of in (lambda node: node.kv, lambda node: node.checkpoint):
        cache = filled(eviction=eviction, priority_classes=classes)
        policy, item = cache.policy, item_of(leaf_of(cache))
        policy.discard(item, evicted=False)
        with pytest.raises(AssertionError, match="lacks"):
            cache.check()
        policy.add(item)
        cache.check()
        inner = leaf_of(cache).parent.kv
        policy.add(inner)
        with pytest.raises(AssertionError, match="which must not be a candidate"):
            cache.check()


@pytest.mark.parametrize("eviction", list(EVICTION))
def test_check_passes_for_every_policy_with_locked_nodes(eviction):
    cache = filled(eviction=eviction)
    handle = cache.lock(leaf_of(cache))
    cache.evict(num_tokens=100, num_slots=100)
    cache.check(held_tokens=0, held_slots=0)
    cache.unlock(handle)
    cache.check(held_tokens=0, held_slots=0)


def test_check_finds_gathered_rows_that_differ_from_the_path():
    cache = filled()
    cache.gather(leaf_of(cache))
    cache.check()
    (segment,) = cache._gathered.rows
    cache._gathered.rows[segment] = cache._gathered.rows[segment][::-1]
    with pytest.raises(AssertionError, match="is not its path"):
        cache.check()


def test_check_finds_withheld_items_that_are_unlocked_or_gone():
    cache = filled()
    leaf = leaf_of(cache)
    cache.policy.discard(leaf.kv, evicted=False)
    cache._withheld.add(leaf.kv)
    with pytest.raises(AssertionError, match="withheld but not locked"):
        cache.check()
    cache.lock(leaf)
    cache.check()
    cache = filled()
    leaf = leaf_of(cache)
    inner, gone = leaf.parent, leaf.parent.checkpoint
    handle = cache.lock(leaf)
    cache.evict(num_slots=10)
    assert inner.checkpoint is None
    cache.lock(inner)
    cache._withheld.add(gone)
    with pytest.raises(AssertionError, match="withheld but gone"):
        cache.check()
    cache._withheld.discard(gone)
    cache.unlock(handle)
    cache.check()
