"""Eviction policies on small worked examples."""

from __future__ import annotations

import pytest

from hybridcache.policies.eviction.arc import ARC
from hybridcache.policies.eviction.lhd import LHD
from hybridcache.policies.eviction.marconi import Marconi
from hybridcache.policies.eviction.queues import Clock
from hybridcache.policies.eviction.s3_fifo import S3Fifo
from hybridcache.policies.eviction.scored import (
    GDSF,
    LFU,
    Random,
    SampledPolicy,
    ScorePolicy,
)
from hybridcache.policies.protocol import Item
from hybridcache.policies.registry import EVICTION, make_eviction
from tests.policies.items import FakeItem, ItemCache, offer


def test_ghost_hits_change_the_target_size_of_arc() -> None:
    policy = ARC()
    cache = ItemCache(policy, 2).serve("abc")
    assert cache.evicted == "a"
    lists = policy._policies["checkpoint"]
    assert lists.target_bytes == 0
    cache.serve("a")
    assert lists.target_bytes == 1, "a ghost of the recent list must add the bytes of one item"
    assert [item.name for _, item in lists.frequent] == ["a"]


def test_arc_ignores_ghosts_of_other_instances() -> None:
    """Tiers pass a ghost to all of their instances. One that never held it must keep its target."""
    policy, other = ARC(), ARC()
    cache = ItemCache(other, 2).serve("abc")
    policy.add(FakeItem("z"))
    policy.on_ghost_hit(cache.ghosts["a"])
    assert policy._policies["checkpoint"].target_bytes == 0


def test_a_ghost_hit_expires() -> None:
    """Items are recognised by position, so a much later checkpoint there is a different one."""

    def survivor(created: int) -> str:
        policy = S3Fifo()
        ghost = FakeItem("ghost", position=640)
        policy.add(ghost)
        assert policy.victim(None) is ghost
        policy.discard(ghost, evicted=True)
        policy.on_ghost_hit(ghost)
        returned = FakeItem("returned", position=640, created=created, last_used=created)
        new = FakeItem("new", position=64, created=created, last_used=created)
        return offer(policy, returned, new)[-1]

    assert survivor(created=2) == "returned"
    assert survivor(created=200) == "new"


def test_the_age_of_lfu_never_falls_across_kinds() -> None:
    """A checkpoint with score 10 is evicted, then KV with score 1. New items still start at 10."""
    policy = LFU()
    frequent, locked = FakeItem("frequent", uses=9), FakeItem("locked", uses=7)
    cold = FakeItem("cold", kind="kv")
    for item in (locked, frequent, cold):
        policy.add(item)
    policy.discard(locked, evicted=False)
    for kind, expected in (("checkpoint", frequent), ("kv", cold)):
        assert policy.victim(kind) is expected  # type: ignore[arg-type]
        policy.discard(expected, evicted=True)
    assert policy.age == 10
    policy.add(locked)
    assert offer(policy, FakeItem("new")) == ["locked", "new"]


def test_gdsf_weighs_cost_uses_and_size() -> None:
    mib = 1 << 20
    used = FakeItem("used", span=10, size_bytes=mib, uses=3)
    cheap = FakeItem("cheap", span=10, size_bytes=mib)
    large = FakeItem("large", span=100, size_bytes=20 * mib)
    # scores: 4*10/1, 1*10/1, 1*100/20
    assert offer(GDSF(), used, cheap, large) == ["large", "cheap", "used"]
    # the age is the score of the last victim, so a new item starts at 5 + its own score
    policy = GDSF()
    assert offer(policy, FakeItem("first", span=5, size_bytes=mib)) == ["first"]
    again = FakeItem("again", span=36, size_bytes=mib)
    policy.add(again)
    old = FakeItem("old", span=40, size_bytes=mib, memo=(0, 0.0))
    assert offer(policy, old) == ["old", "again"]


def test_the_kind_with_the_older_use_is_evicted_first() -> None:
    kv, checkpoint = FakeItem("kv", kind="kv", last_used=3), FakeItem("checkpoint", last_used=2)
    assert offer(Clock(), kv, checkpoint) == ["checkpoint", "kv"]


def test_random_is_seeded_and_evicts_every_item() -> None:
    names = "abcdefgh"
    orders = [offer(Random(seed=3), *(FakeItem(name) for name in names)) for _ in range(2)]
    assert sorted(orders[0]) == list(names)
    assert orders[0] == orders[1] != offer(Random(seed=4), *(FakeItem(name) for name in names))


def test_lhd_learns_the_age_at_which_items_are_used() -> None:
    # one class is used every 2 requests, the other never: after a recomputation the idle one is
    # evicted first, although both kinds started with the same statistics
    policy = LHD()
    hot = FakeItem("hot", kind="checkpoint")
    policy.add(hot)
    for now in range(2, 1200, 2):
        hot.last_used, hot.uses = now, hot.uses + 1
        policy.touch(hot)
        idle = FakeItem(f"idle{now}", created=now - 40, last_used=now - 40, kind="kv")
        policy.add(idle)
        assert policy.victim("kv") is idle
        policy.discard(idle, evicted=True)
    fresh = FakeItem("fresh", kind="kv", created=1198, last_used=1198)
    policy.add(fresh)
    assert policy.victim(None) is fresh


def test_marconi_trades_recency_for_flops_per_byte() -> None:
    def items() -> list[FakeItem]:
        return [
            FakeItem("old_rich", last_used=1, span=1000, position=1000),
            FakeItem("middle", last_used=5, span=500, position=500),
            FakeItem("new_poor", last_used=9, span=10, position=10),
        ]

    assert offer(Marconi(0.0), *items()) == ["old_rich", "middle", "new_poor"]
    # alpha 2: 0 + 2, 0.5 + about 1, 1 + 0; then of the two left 0 + 2 against 1 + 0
    assert offer(Marconi(2.0), *items())[0] == "new_poor"


def test_unreachable_kv_is_evicted_before_all_other_items() -> None:
    for make in (EVICTION["marconi"], EVICTION["survival"]):
        dead = FakeItem("dead", kind="kv", dead=True, last_used=100)
        alive = FakeItem("alive", last_used=1)
        assert offer(make(), alive, dead) == ["dead", "alive"]


@pytest.mark.parametrize("eviction", [*sorted(EVICTION), "marconi:0.5"])
def test_every_policy_evicts_all_items_of_each_kind(eviction: str) -> None:
    policy = make_eviction(eviction)()
    items = [FakeItem(f"c{n}", last_used=n, created=n) for n in range(5)]
    items += [FakeItem(f"k{n}", kind="kv", last_used=n, created=n) for n in range(5)]
    for item in items:
        policy.add(item)
    for kind in ("kv", "checkpoint"):
        for _ in range(5):
            victim = policy.victim(kind)
            assert victim is not None and victim.kind == kind
            policy.discard(victim, evicted=True)
        assert policy.victim(kind) is None
    assert policy.victim(None) is None


def test_custom_scored_and_sampled_policies() -> None:
    class ShallowLast(ScorePolicy):
        def score(self, item: Item) -> float:
            return -item.position

    class Newest(SampledPolicy):
        def score(self, item: Item) -> float:
            return self.now - item.last_used

    items = [FakeItem(str(n), position=64 * n, last_used=n) for n in (1, 3, 2)]
    assert offer(ShallowLast(), *items) == ["3", "2", "1"]
    assert offer(Newest(), *items) == ["3", "2", "1"]


def test_a_score_that_grew_is_updated_before_eviction() -> None:
    class LongestLast(ScorePolicy):
        def score(self, item: Item) -> float:
            return item.span

    policy = LongestLast()
    lone, neighbour = FakeItem("lone", span=50), FakeItem("neighbour", span=80)
    policy.add(lone)
    policy.add(neighbour)
    lone.span = 500
    assert policy.victim(None) is neighbour
