"""``check`` recomputes every structure: each lie that is told here to one of them is found."""

from __future__ import annotations

import pytest

from hybridcache.policies.registry import EVICTION
from tests.cache.serving import hybrid, ids, publish

TELLING = ("lru", "fifo", "hyperbolic", "hybridcache.policies.eviction.scored:FIFO")
"""One of each base that can tell what it holds."""


def filled(**options):
    """Two leaves under a fork, and a checkpoint above them."""
    cache = hybrid(**options)
    publish(cache, ids("abcde"), [2, 5])
    publish(cache, ids("abX"), [3])
    cache.check(held_tokens=0, held_slots=0)
    return cache


def leaf_of(cache):
    return cache.match(ids("abcdef")).node


@pytest.mark.parametrize("tiers", [False, True])
@pytest.mark.parametrize("eviction", TELLING)
def test_what_the_policy_forgot_and_what_it_should_not_know(eviction, tiers):
    for item_of in (lambda node: node.kv, lambda node: node.checkpoint):
        cache = filled(eviction=eviction, dead_first=tiers, demote_superseded=tiers)
        policy, item = cache._residency.policy, item_of(leaf_of(cache))
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
def test_no_policy_is_accused_of_what_it_holds(eviction):
    cache = filled(eviction=eviction)
    receipt = cache.lock(leaf_of(cache))
    cache.evict(num_tokens=100, num_slots=100)
    cache.check(held_tokens=0, held_slots=0)
    cache.unlock(receipt)
    cache.check(held_tokens=0, held_slots=0)


def test_what_was_gathered_is_what_stands_on_the_path():
    cache = filled()
    cache.gather(leaf_of(cache))
    cache.check()
    (segment,) = cache._gathered.rows
    cache._gathered.rows[segment] = cache._gathered.rows[segment][::-1]
    with pytest.raises(AssertionError, match="is not its path"):
        cache.check()


def test_what_is_withheld_is_locked_and_there():
    cache = filled()
    leaf = leaf_of(cache)
    cache._residency.policy.discard(leaf.kv, evicted=False)
    cache._residency.withheld.add(leaf.kv)
    with pytest.raises(AssertionError, match="withheld but not locked"):
        cache.check()
    cache.lock(leaf)
    cache.check()
    cache = filled()
    leaf = leaf_of(cache)
    inner, gone = leaf.parent, leaf.parent.checkpoint
    receipt = cache.lock(leaf)
    cache.evict(num_slots=10)
    assert inner.checkpoint is None
    cache.lock(inner)
    cache._residency.withheld.add(gone)
    with pytest.raises(AssertionError, match="withheld but gone"):
        cache.check()
    cache._residency.withheld.discard(gone)
    cache.unlock(receipt)
    cache.check()
