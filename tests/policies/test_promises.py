"""Promises of clients to return (``LeaseRequest.returns_within_s``), as ``survival`` has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from engine.front.server.schemas import Sampling
from hybridcache import CacheConfig, Lease, LeaseRequest, build_prefix_cache, parse_placement
from hybridcache.policies.eviction.survival import NUM_BINS, TRUSTED_AFTER, Survival
from hybridcache.radix.tree import Promise
from tests.policies.items import FakeItem
from tests.radix.serving import serve_lease
from tests.radix.test_machine import at_least

NAMESPACES = ("A", "B", "C")


class PromiseMachine(RuleBasedStateMachine):
    """Uses, evictions and promises of three tenants, compared with the order without promises."""

    def __init__(self) -> None:
        super().__init__()
        self.policy, self.now_s, self.now = Survival(), 0.0, 0
        self.policy.set_clock(lambda: self.now_s)
        self.items: list[FakeItem] = []

    def plain_values(self) -> dict[FakeItem, float]:
        """Return the value of each candidate without promises."""
        hazards, values = self.policy.hazards, {}
        for item in self.items:
            rate = hazards.index_at(item.memo.row, hazards.now - item.memo.entered)
            worth = item.span / item.size_bytes
            values[item] = rate * worth ** min(hazards.num_uses / TRUSTED_AFTER or 1.0, 1.0)
        return values

    @rule(
        owner=st.sampled_from(NAMESPACES),
        span=st.integers(1, 500),
        promised_s=st.none() | st.floats(0, 50),
    )
    def add(self, owner: str, span: int, promised_s: float | None) -> None:
        self.now += 1
        item = FakeItem("x", span=span, position=span, created=self.now, last_used=self.now)
        item.namespace = owner
        if promised_s is not None:
            item.promise = Promise(self.now_s, self.now_s + promised_s, self.now, 0)
        self.items.append(item)
        self.policy.add(item)

    @precondition(lambda self: self.items)
    @rule(data=st.data(), again_s=st.none() | st.floats(0, 50))
    def use(self, data: Any, again_s: float | None) -> None:
        item = data.draw(st.sampled_from(self.items))
        self.now += 1
        item.uses, item.last_used = item.uses + 1, self.now
        self.policy.touch(item)
        if again_s is not None:
            item.promise = Promise(self.now_s, self.now_s + again_s, self.now, item.uses)

    @rule(seconds=st.floats(0, 40))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @precondition(lambda self: self.items)
    @rule()
    def evict(self) -> None:
        policy, columns = self.policy, self.policy._checkpoints
        victim = policy.victim("checkpoint")
        assert victim in self.items
        places = {item: item.memo.place for item in self.items}
        ages = {item: policy.hazards.now - columns.times[place] for item, place in places.items()}
        trust = min(policy.hazards.num_uses / TRUSTED_AFTER or 1.0, 1.0)
        charged = {
            item: policy.hazards.index_at(columns.cells[place] // NUM_BINS, int(ages[item]))
            * columns.worths[place] ** trust
            for item, place in places.items()
        }
        least = min(charged.values())
        payers = {one.namespace for one in self.items if charged[one] <= least * (1 + 1e-9)}
        assert victim.namespace in payers, "a promise of one namespace cost another one an entry"
        is_free = all(item.promise_at(self.now_s) is None for item in self.items)
        values = self.plain_values()
        assert not is_free or values[victim] <= min(values.values()) * (1 + 1e-9)
        self.items.remove(victim)
        policy.discard(victim, evicted=True)
        assert all(columns.items[item.memo.place] is item for item in policy._lent)

    def teardown(self) -> None:
        """Compare the order of all that is left with the one without promises, in later time."""
        self.now_s += 100
        while self.items:
            self.evict()
        assert not self.policy._lent


FEW = settings(max_examples=25, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("runs", [FEW, pytest.param(at_least(300), marks=pytest.mark.full)])
def test_promises_cost_their_own_namespace_and_leave_no_trace(runs: settings) -> None:
    run_state_machine_as_test(PromiseMachine, settings=runs)


class Tenants:
    """Leases of tenants in one small cache with slots for ``num_slots`` states."""

    def __init__(self, num_slots: int, eviction: str = "survival") -> None:
        config = CacheConfig(
            num_kv_tokens=4000, num_slots=num_slots, grid=8, eviction=eviction, debug=True
        )
        self.cache = build_prefix_cache(config)
        self.placement, self.now_s = parse_placement("end"), 0.0
        self.cache.policy.set_clock(lambda: self.now_s)

    def text(self, number: int) -> np.ndarray:
        """Return a prompt of 16 tokens and its answer of 8."""
        return np.arange(1000 * number, 1000 * number + 24, dtype=np.int32)

    def serve(
        self, number: int, promised_s: float | None = None, tenant: str = "A", how: str = ""
    ) -> None:
        text = self.text(number)
        asked = LeaseRequest(text[:16], tenant, returns_within_s=promised_s)
        serve_lease(self.cache, self.placement, asked, text[16:], how)
        self.now_s += 1
        self.cache.check()

    def kept(self, tenant: str = "A") -> set[int]:
        found = range(1, 30)
        longer = {number: np.append(self.text(number), np.int32(7)) for number in found}
        return {n for n in found if self.cache.match(longer[n], tenant).cached_len}


def test_a_promise_keeps_the_end_of_a_conversation_until_its_time() -> None:
    silent, promised = Tenants(5), Tenants(5)
    for number in range(1, 8):
        silent.serve(number)
        promised.serve(number, 9.0 if number == 1 else None)
    assert 1 not in silent.kept() and 1 in promised.kept()
    assert len(silent.kept()) == len(promised.kept())
    for number in range(8, 14):
        promised.serve(number)
    assert 1 not in promised.kept(), "the promise had ended"


def test_a_promise_costs_the_namespace_that_made_it() -> None:
    silent, lying = Tenants(7), Tenants(7)
    for number in range(1, 16):
        tenant = "AB"[number % 2]
        silent.serve(number, tenant=tenant)
        lying.serve(number, 20.0 if tenant == "A" and number < 5 else None, tenant)
    assert silent.kept("B") == lying.kept("B")
    assert len(silent.kept("A")) == len(lying.kept("A")) and silent.kept("A") != lying.kept("A")


def test_a_kept_promise_and_an_ended_session_end_the_promise() -> None:
    tenants = Tenants(6)
    tenants.serve(1, 100.0)
    [node] = [node for node in tenants.cache.iter_nodes() if node.checkpoint is not None]
    tip = node.checkpoint
    assert tip.promise_at(99.0) == tip.promise and node.kv.promise_at(99.0) == tip.promise
    assert tip.promise_at(100.0) is None and node.kv.promise == tip.promise
    longer = np.append(tenants.text(1), np.arange(20, dtype=np.int32))
    with Lease.begin(tenants.cache, tenants.placement, LeaseRequest(longer, "A")) as lease:
        assert lease.extend(len(longer))
    assert tip.uses == 1 and tip.promise_at(1.0) is None
    tenants.serve(2, 100.0, how="session_end")
    assert all(
        one.checkpoint is None or one.checkpoint.promise_at(1.0) is None
        for one in tenants.cache.iter_nodes()
    )


@pytest.mark.parametrize("eviction", ["lru", "marconi", "sieve", "survival"])
def test_other_policies_and_promises_without_time_change_nothing(eviction: str) -> None:
    silent, promised = Tenants(5, eviction), Tenants(5, eviction)
    for number in range(1, 12):
        silent.serve(number)
        promised.serve(number, 0.0 if eviction == "survival" else 50.0)
    assert silent.kept() == promised.kept()


@pytest.mark.parametrize("wrong", ["5", True, -1.0, float("inf"), float("nan")])
def test_a_promise_that_is_no_time_is_refused(wrong: Any) -> None:
    tenants = Tenants(5)
    asked = LeaseRequest(tenants.text(1), returns_within_s=wrong)
    with pytest.raises((TypeError, ValueError), match="returns_within_s must be"):
        Lease.begin(tenants.cache, tenants.placement, asked)
    tenants.cache.check(held_tokens=0, held_slots=0)


def test_the_metadata_of_a_body_has_the_promise_as_a_number_or_text() -> None:
    assert Sampling().session == {"ends_session": False, "session": ""}
    for given, promised_s in (("2.5", 2.5), (3, 3.0)):
        asked = Sampling(metadata={"returns_within_s": given, "session_end": "True"})
        assert asked.session["returns_within_s"] == promised_s and asked.session["ends_session"]
    for wrong in ("soon", "inf", -1, True, [1]):
        with pytest.raises(ValueError, match="returns_within_s must be"):
            assert Sampling(metadata={"returns_within_s": wrong}).session
