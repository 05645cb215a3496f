"""Locked victims: a victim that is locked is not evicted, so policies learn nothing from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hybridcache.lab.rivals.evictions import ALL_NAMES, make_eviction
from tests.policies.items import FakeItem
from tests.radix.serving import hybrid, ids, serve

LEARNED: dict[str, Callable[[Any], object]] = {
    "lfu": lambda policy: policy.age,
    "gdsf": lambda policy: policy.age,
    "lhd": lambda policy: float(policy._evictions.sum()),
    "arc": lambda policy: sum(policy._policies["checkpoint"].num_ghosts.values()),
}
"""State of policies that an eviction changes and a refused eviction must not change."""


@pytest.mark.parametrize("eviction", LEARNED)
def test_a_locked_victim_does_not_count_as_an_eviction(eviction: str) -> None:
    cache = hybrid(eviction=make_eviction(eviction), priority_classes=False)
    policy = cache.policy
    for _ in range(5):
        serve(cache, ids("prompt"), [5])
    before = LEARNED[eviction](policy)
    handle = cache.lock(cache.match(ids("prompt")).node)
    assert cache.evict(num_slots=1) == (0, 0)
    assert LEARNED[eviction](policy) == before
    cache.unlock(handle)
    assert cache.evict(num_slots=1).num_slots == 1
    assert LEARNED[eviction](policy) != before


@pytest.mark.parametrize("eviction", sorted(ALL_NAMES))
def test_a_ghost_without_a_memo_is_accepted(eviction: str) -> None:
    """Ghosts of a loaded file have no memo of the policy."""
    policy = make_eviction(eviction)()
    policy.on_ghost_hit(FakeItem("ghost"))
    new = FakeItem("new", created=1, last_used=1)
    policy.add(new)
    assert policy.victim(None) is new
