"""Injected faults of the cache, allocators, leases, tiers, policies, events and routing."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hybridcache.adapters.events import EventStream
from hybridcache.adapters.routing.outbox import Outbox
from hybridcache.allocators.moves import Move, StepQueue
from hybridcache.allocators.pools import PageAllocator, SlotAllocator
from hybridcache.lab.rivals import evictions
from hybridcache.policies.eviction.lru import LRU
from hybridcache.policies.eviction.survival import Survival
from hybridcache.radix.cache import HybridRadixCache
from hybridcache.radix.lease import Lease
from hybridcache.radix.tiers import TieredRadixCache
from tests.adapters.test_events_machine import EventsMachine
from tests.allocators import test_arena
from tests.allocators.test_allocators import AllocatorMachine
from tests.allocators.test_arena import ArenaMachine
from tests.faults.injection import Check, Fault, Faults, assert_detected, machine
from tests.lab.rivals import test_textbook
from tests.policies import test_regret
from tests.radix import test_rules, test_tiers
from tests.radix.test_arena import config_of, serve_twins
from tests.radix.test_lease_machine import LeaseMachine
from tests.radix.test_machine import CacheMachine
from tests.radix.test_tiers_machine import TieredMachine
from tests.radix.twins import Twins

FAULTS = Faults()
CACHE = machine(CacheMachine, max_examples=400)
TIERS = machine(TieredMachine)
ALLOCATORS, EVENTS = machine(AllocatorMachine), machine(EventsMachine)


def arena() -> None:
    """Serve random requests on small arenas and compare with the plain cache."""
    for seed in range(20):
        rng = random.Random(seed)
        twins = Twins(config_of(rng, "arena"))
        serve_twins(twins, rng, num_operations=100)
        for _ in range(5):
            twins.evict(rng.randint(1, 6), 0)
        twins.check()


def fetch_into_a_lease() -> None:
    """Begin a lease for which a load saves time. Random operations seldom load a prefix."""
    test_tiers.test_a_lease_fetches_if_it_saves_time_and_counts_the_rest(0.01, 4, 0)


def short_tables() -> None:
    """Run random operations of leases whose row tables grow."""
    for seed in range(40):
        state_machine = LeaseMachine()
        state_machine.make(seed, "branch,boundary,backoff,end", spare_rows=seed % 2)
        try:
            for number in range(4):
                state_machine.many_operations(1000 * seed + number, 40)
        finally:
            state_machine.teardown()


# --- Methods of the cache -----------------------------------------------------------------------


@FAULTS.of(arena, HybridRadixCache, "lock")
def a_lock_does_not_protect(original: Any, self: Any, node: Any) -> Any:
    handle = original(self, node)
    self.unlock(handle)
    return handle


@FAULTS.of(CACHE, HybridRadixCache, "match")
def a_match_ignores_the_namespace(
    original: Any, self: Any, tokens: Any, namespace: Any = None
) -> Any:
    return original(self, tokens)


@FAULTS.of(CACHE, HybridRadixCache, "match")
def a_request_resumes_at_the_very_end_of_its_prompt(
    original: Any, self: Any, tokens: Any, namespace: Any = None
) -> Any:
    return original(self, np.append(tokens, np.int32(5)), namespace)


@FAULTS.of(test_rules.test_match_changes_nothing, HybridRadixCache, "match")
def a_match_counts_as_a_use(original: Any, self: Any, tokens: Any, namespace: Any = None) -> Any:
    found = original(self, tokens, namespace)
    self.touch(found)
    return found


@FAULTS.of(CACHE, HybridRadixCache, "match")
def evicted_prefixes_are_reported_as_never_seen(
    original: Any, self: Any, tokens: Any, namespace: Any = None
) -> Any:
    found = original(self, tokens, namespace)
    losses = found.losses
    seen = losses._replace(never_seen=losses.never_seen + losses.kv_evicted, kv_evicted=0)
    return found._replace(losses=seen)


@FAULTS.of(CACHE, HybridRadixCache, "match")
def a_match_ignores_ghosts(original: Any, self: Any, tokens: Any, namespace: Any = None) -> Any:
    found = original(self, tokens, namespace)
    return found._replace(seen_len=found.kv_match_len, missed=None)


@FAULTS.of(arena, HybridRadixCache, "touch")
def a_policy_is_not_notified_of_misses(original: Any, self: Any, match: Any) -> None:
    original(self, match._replace(missed=None))


@FAULTS.of(CACHE, HybridRadixCache, "insert")
def an_insert_drops_all_checkpoints(
    original: Any, self: Any, tokens: Any, rows: Any, saved: Any = (), *rest: Any, **more: Any
) -> Any:
    return original(self, tokens, rows, (), *rest, **more)


@FAULTS.of(CACHE, HybridRadixCache, "insert")
def a_checkpoint_is_stored_one_step_too_early(
    original: Any, self: Any, tokens: Any, rows: Any, saved: Any = (), *rest: Any, **more: Any
) -> Any:
    step = max(self.grid, self.page_size)
    early = [(position - step if position > step else position, slot) for position, slot in saved]
    return original(self, tokens, rows, early, *rest, **more)


@FAULTS.of(arena, HybridRadixCache, "insert")
def duplicate_rows_are_not_returned(original: Any, self: Any, *args: Any, **more: Any) -> Any:
    result = original(self, *args, **more)
    return result._replace(duplicates=result.duplicates[:0])


@FAULTS.of(arena, HybridRadixCache, "insert")
def rejected_slots_are_not_returned(original: Any, self: Any, *args: Any, **more: Any) -> Any:
    return original(self, *args, **more)._replace(rejected_slots=())


@FAULTS.of(short_tables, Lease, "publish")
def a_request_publishes_tokens_that_are_not_computed(
    original: Any, self: Any, tokens: Any, computed_len: int
) -> Any:
    return original(self, tokens, min(computed_len + 4, len(tokens), self.extended_len))


@FAULTS.of(arena, HybridRadixCache, "evict")
def an_eviction_frees_more_than_requested(
    original: Any, self: Any, num_tokens: int = 0, num_slots: int = 0
) -> Any:
    return original(self, num_tokens + self.page_size, num_slots)


@FAULTS.of(arena, HybridRadixCache, "allocate_kv")
def a_refused_allocation_evicts(original: Any, self: Any, num_tokens: int) -> Any:
    rows = original(self, num_tokens)
    if rows is None:
        self.evict(num_tokens)
    return rows


@FAULTS.of(CACHE, HybridRadixCache, "gather")
def rows_of_a_path_are_gathered_in_reverse(original: Any, self: Any, node: Any) -> Any:
    return original(self, node)[::-1]


@FAULTS.of(CACHE, LRU, "victim")
def lru_evicts_the_newest_item(_: Any, self: Any, kind: Any) -> Any:
    found = [one for one in self.candidates() if kind in (None, one.kind)]
    return max(found, key=lambda one: (one.last_used, one.serial), default=None)


# --- Allocators ---------------------------------------------------------------------------------


@FAULTS.of(ALLOCATORS, PageAllocator, "free")
def the_last_freed_page_is_lost(original: Any, self: Any, rows: Any) -> None:
    original(self, rows[: max(0, len(rows) - self.page_size)])


@FAULTS.of(ALLOCATORS, PageAllocator, "allocate")
def a_page_is_allocated_twice(original: Any, self: Any, num_tokens: int) -> Any:
    rows = original(self, num_tokens)
    if rows is not None and len(rows):
        self.free(rows[-self.page_size :])
    return rows


@FAULTS.of(ALLOCATORS, PageAllocator, "free")
def freed_bytes_are_not_returned_to_the_budget(original: Any, self: Any, rows: Any) -> None:
    original(self, rows)
    if self.budget is not None:
        self.budget.free_bytes -= 1


@FAULTS.of(machine(ArenaMachine), Move, "rename")
def moved_rows_keep_their_old_numbers(original: Any, self: Any, rows: Any) -> Any:
    return original(self, rows.copy())


@FAULTS.of(test_arena.test_moves_are_taken_once_and_in_order, StepQueue, "take")
def moves_are_taken_in_reverse_order(original: Any, self: Any) -> Any:
    plan = original(self)
    return replace(plan, transfers=plan.transfers[::-1])


@FAULTS.of(machine(ArenaMachine), StepQueue, "take")
def moves_are_taken_twice(original: Any, self: Any) -> Any:
    plan = original(self)
    for move in plan.transfers[:1]:
        self.rows_moved(move)
    return plan


OLD_ROWS: dict[int, Any] = {}


@FAULTS.of(arena, HybridRadixCache, "gather")
def moved_rows_are_gathered_from_their_old_place(original: Any, self: Any, node: Any) -> Any:
    return OLD_ROWS.setdefault(id(node), original(self, node).copy())


# --- Tiers --------------------------------------------------------------------------------------


@FAULTS.of(fetch_into_a_lease, TieredRadixCache, "load")
def a_fetch_reports_success_without_copying(original: Any, self: Any, resumable: Any) -> bool:
    return True


@FAULTS.of(TIERS, StepQueue, "take")
def copies_between_tiers_are_reversed(original: Any, self: Any) -> Any:
    plan = original(self)
    return replace(plan, transfers=plan.transfers[::-1])


@FAULTS.of(TIERS, StepQueue, "take")
def the_last_copy_between_tiers_is_missing(original: Any, self: Any) -> Any:
    plan = original(self)
    return replace(plan, transfers=plan.transfers[:-1])


@FAULTS.of(
    test_tiers.test_an_offloaded_state_is_superseded_only_while_a_deeper_one_exists,
    HybridRadixCache,
    "match",
)
def a_match_offers_only_the_first_offloaded_state(
    original: Any, self: Any, tokens: Any, namespace: Any = None
) -> Any:
    found = original(self, tokens, namespace)
    return found._replace(loadable=found.loadable[:1])


# --- Policies -----------------------------------------------------------------------------------


def policy_check(name: str) -> Check:
    """Return the check that compares a policy with the pseudocode of its paper. It draws all
    examples, also if the level draws fewer for the test itself."""
    compare = test_textbook.test_victims_match_the_pseudocode_of_the_paper.hypothesis.inner_test

    @settings(max_examples=300, phases=[Phase.generate])
    @given(test_textbook.requests, st.integers(1, 6))
    def check(pages: str, capacity: int) -> None:
        compare(name, pages, capacity)

    check.__name__ = f"{name} compared with its paper"
    return check


LFU, CLOCK, ARC = map(policy_check, ("lfu", "clock", "arc"))


# --- Events and routing -------------------------------------------------------------------------


@FAULTS.of(EVENTS, Outbox, "since")
def the_oldest_missing_batch_is_not_resent(original: Any, self: Any, sequence: int) -> Any:
    return original(self, sequence + 1) or []


# --- Methods that do nothing --------------------------------------------------------------------

GHOSTS = test_regret.test_all_ghosts_on_the_path_count_as_used_except_superseded_ones
FAULTS |= {
    "a lock is never released": Fault(CACHE, HybridRadixCache, "unlock"),
    "a use is not counted": Fault(arena, HybridRadixCache, "touch"),
    "a reset does nothing": Fault(CACHE, HybridRadixCache, "reset"),
    "a freed slot is lost": Fault(ALLOCATORS, SlotAllocator, "free"),
    "lfu ignores uses": Fault(LFU, evictions.LFU, "touch"),
    "clock ignores uses": Fault(CLOCK, evictions.Clock, "touch"),
    "arc ignores ghost hits": Fault(ARC, evictions.ARC, "on_ghost_hit"),
    "survival ignores ghosts above the missed one": Fault(GHOSTS, Survival, "on_ghost_hit_above"),
    "evicted checkpoints are not reported": Fault(EVENTS, EventStream, "checkpoint_removed"),
    "splits are not reported": Fault(EVENTS, EventStream, "kv_split"),
}


SLOW = {
    "a checkpoint is stored one step too early",
    "evicted prefixes are reported as never seen",
    "a match ignores ghosts",
}
"""Faults that only a long run detects."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] * (name in SLOW)) for name in FAULTS]
)
def test_a_fault_is_detected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_detected(FAULTS[name], monkeypatch)


@pytest.mark.full
@pytest.mark.parametrize("check", FAULTS.checks, ids=lambda check: check.__name__)
def test_without_a_fault_the_check_passes(check: Check) -> None:
    check()
