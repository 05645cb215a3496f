"""Tests of cache events: a subscriber can reconstruct the contents of the cache."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pytest

from hybridcache.adapters.events import EventStream, Mirror
from tests.radix.serving import hybrid, ids, serve
from tests.refused import refused


def test_event_of_a_segment_needs_no_walk_to_the_root():
    cache, mirror = hybrid(num_kv_tokens=4000), Mirror(unit=1)
    cache.subscribe(EventStream(mirror.apply))
    tokens, rows = ids(range(1000)), cache.allocate_kv(1000)
    node = cache.insert(tokens[:998], rows[:998], namespace="tenant").node
    root = node.parent
    node = cache.insert(
        tokens[:999], rows[:999], (), "tenant", 998, after=cache.lock(node).node
    ).node
    root.key = "must not be read"
    cache.insert(tokens, rows, (), "tenant", 999, after=cache.lock(node).node)
    root.key = "tenant"
    assert mirror.match(tokens, "tenant").kv_match_len == 1000


def test_namespaces_with_similar_text_are_different():
    cache, mirror = hybrid(num_slots=20), Mirror(unit=1)
    cache.subscribe(EventStream(mirror.apply))
    tenants = [("a", 1), "('a', 1)", ("tuple", "a", 1), ("repr", "b'salt'"), b"salt", "b'salt'"]
    tenants += [1, "1", "\ud800", repr("\ud800"), None, "None"]
    for number, tenant in enumerate(tenants):
        serve(cache, ids("shared", range(number)), [6], tenant)
    for number, tenant in enumerate(tenants):
        assert mirror.match(ids("shared", range(number)), tenant).kv_match_len == 6 + number
        assert mirror.match(ids("shared", range(40)), tenant).kv_match_len == 6 + number
    cache.reset()
    mirror.check()
    assert not mirror.num_tokens


@pytest.mark.parametrize("other", [True, 1.0, np.float64(1), np.int64(1), 1 + 0j, Decimal(1)])
@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: ("a", (one,))])
def test_values_that_only_compare_equal_to_a_namespace_are_rejected(other, wrap):
    """Since 1 == True == 1.0, a method could otherwise confuse the namespaces of two tenants."""
    prompt, one, other = ids([1, 2, 3, 4]), wrap(1), wrap(other)
    assert one == other
    cache, mirror = hybrid(), Mirror(unit=1)
    cache.subscribe(EventStream(mirror.apply))
    serve(cache, prompt, [3], one)
    rows = cache.allocate_kv(4)
    for method in (
        lambda: cache.match(prompt, other),
        lambda: cache.lock_kv(prompt, other),
        lambda: cache.insert(prompt, rows, (), other),
        lambda: mirror.match(prompt, other),
    ):
        refused("use None, a str, bytes, an int, or a tuple of these", method)
    cache.check(held_tokens=4, held_slots=0)
