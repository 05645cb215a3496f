"""What a policy makes of a victim that is locked and stays: no eviction, so nothing is learnt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hybridcache.policies.registry import EVICTION, make_eviction
from tests.cache.serving import hybrid, ids, serve
from tests.policies.items import FakeItem

LEARNT: dict[str, Callable[[Any], object]] = {
    "lfu": lambda policy: policy.age,
    "gdsf": lambda policy: policy.age,
    "lhd": lambda policy: float(policy._evictions.sum()),
    "arc": lambda policy: sum(policy._policies["checkpoint"].num_ghosts.values()),
}
"""What an eviction moves, and a refusal must not."""


@pytest.mark.parametrize("word", LEARNT)
def test_a_locked_victim_that_stays_is_no_eviction(word: str) -> None:
    cache = hybrid(eviction=word, dead_first=False, demote_superseded=False)
    policy = cache._residency.policy
    for _ in range(5):
        serve(cache, ids("prompt"), [5])
    before = LEARNT[word](policy)
    receipt = cache.lock(cache.match(ids("prompt")).node)
    assert cache.evict(num_slots=1) == (0, 0)
    assert LEARNT[word](policy) == before
    cache.unlock(receipt)
    assert cache.evict(num_slots=1).num_slots == 1
    assert LEARNT[word](policy) != before


def test_a_locked_tip_hands_no_demand_up() -> None:
    policy = EVICTION["survival"]()
    first = FakeItem("first", superseded=True, position=10, span=10)
    tip = FakeItem("tip", above=first, created=1, position=20, span=10)
    policy.add(first)
    policy.add(tip)
    policy.discard(tip, evicted=False)
    assert first.memo.demand is None
    policy.add(tip)
    policy.discard(tip, evicted=True)
    assert first.memo.demand == tip.memo.key


def test_a_tip_evicted_with_its_kv_hands_its_demand_up() -> None:
    """Two pools: the leaf's KV is the victim, and its checkpoint goes with it."""
    cache = hybrid(eviction="survival")
    serve(cache, ids("one turn"), [8])
    serve(cache, ids("one turn, and another"), [21])
    first = cache.match(ids("one turn.")).resumed
    tip = cache.match(ids("one turn, and another.")).resumed
    assert first.superseded and not tip.superseded
    cache.evict(num_tokens=1)
    assert tip.node.checkpoint is None
    assert first.memo.demand == tip.memo.key


def test_the_loser_of_a_duel_that_is_locked_keeps_its_place() -> None:
    policy = EVICTION["w-tinylfu"]()
    queues = policy._policies["checkpoint"]
    loser, winner = FakeItem("loser"), FakeItem("winner", created=1, last_used=1)
    for item in (loser, winner):
        policy.add(item)
    queues._duel = (loser, winner)
    policy.discard(loser, evicted=False)
    assert winner.memo.queue is queues.window


@pytest.mark.parametrize("word", sorted(EVICTION))
def test_a_ghost_without_a_memo_is_no_fault(word: str) -> None:
    """As of a loaded snapshot: the evicted checkpoint is known, what its policy thought of it is
    not."""
    policy = make_eviction(word)()
    policy.on_ghost_hit(FakeItem("ghost"))
    fresh = FakeItem("fresh", created=1, last_used=1)
    policy.add(fresh)
    assert policy.victim(None) is fresh
