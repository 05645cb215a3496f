"""Eviction policies on small worked examples."""

from __future__ import annotations

from hybridcache.policies.eviction.gdsf import GDSF
from hybridcache.policies.eviction.lhd import LHD
from tests.policies.items import FakeItem, offer


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
