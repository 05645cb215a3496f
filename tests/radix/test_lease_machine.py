"""State machine: leases with tiers, short pools, a learned placement policy, a router that reads
events, arrivals, drafts, preemptions and aborts.

No row or slot leaks, every computed prompt token has one loss cause, and every planned checkpoint
is either saved or dropped.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from engine.plugins.disaggregation.prefix_load import ReceivedPrefix
from hybridcache.adapters.routing.outbox import Outbox
from hybridcache.adapters.routing.precise import CheckpointSeconds
from hybridcache.adapters.routing.protocol import ReplicaSpec, RouteRequest
from hybridcache.allocators.moves import DEVICE, Copy, Drop, Move, RowWrite
from hybridcache.config import CacheConfig, build_prefix_cache
from hybridcache.policies.eviction.survival import Survival
from hybridcache.policies.placement import Adaptive, Placement
from hybridcache.policies.registry import parse_placement
from hybridcache.radix import lease as lease_module
from hybridcache.radix.lease import Lease, LeaseRequest
from hybridcache.radix.protocol import Placed, Prefill, PromptBoundaries
from hybridcache.radix.tokens import Tokens
from tests.radix.serving import PerToken, Rate
from tests.radix.test_machine import at_least
from tests.refused import refused

ROW_BYTES = 2
PLACEMENTS = (
    "adaptive",
    "adaptive",
    "adaptive,every:8",
    "branch,boundary,backoff,end",
    "backoff:2,end",
    "every:8",
    "none",
)
ENDS = ("finish", "session_end", "preempt", "abort")
SPARE_ROWS = (0, 1, 7, lease_module.SPARE_ROWS)
"""Spare capacities of the rows of a lease. Small ones grow the array inside a request."""
OWN_LABELS = ("decode", "preempt")
"""Labels of checkpoints that a lease saves without a plan."""


class CustomPolicy(Survival):
    """Eviction policy defined outside the package."""


class Ledger(Placement):
    """Placement policy that records planned, saved and dropped checkpoints."""

    def __init__(self, spec: str) -> None:
        inner = parse_placement(spec)
        super().__init__((inner,))
        self.planned: dict[int, str] = {}
        self.prefills = 0
        self.saved: list[Placed] = []
        self.dropped: list[Placed] = []

    def plan(self, prefill: Prefill) -> list[Placed]:
        wanted = super().plan(prefill)
        self.planned = prefill.on_grid(wanted)
        return wanted

    def on_prefill(self, prefill: Prefill) -> None:
        self.prefills += 1
        super().on_prefill(prefill)

    def on_saved(self, placed: Placed) -> None:
        self.saved.append(placed)
        super().on_saved(placed)

    def on_dropped(self, placed: Placed) -> None:
        self.dropped.append(placed)
        super().on_dropped(placed)


@dataclass(eq=False)
class Running:
    """Request with its lease and the checkpoints that the lease planned."""

    id: int
    tokens: Tokens
    prompt_len: int
    lease: Lease
    computed_len: int
    reuse: bool
    is_counted: bool = False
    planned: Counter[Placed] = field(default_factory=Counter)
    settled: Counter[Placed] = field(default_factory=Counter)
    """Planned checkpoints that were reported to the placement policy as saved or dropped."""
    needs_restore: bool = False
    """True if the next plan restores the state of the request."""


class Tensors:
    """Counter of the work that a step plan passes to its memory."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def move(self, move: Move) -> None:
        self.counts["move"] += 1

    def copy(self, copy: Copy) -> None:
        self.counts["copy"] += 1

    def write_row(self, write: RowWrite) -> None:
        self.counts["write_row"] += 1

    def restore(self, checkpoint: int, own: int) -> None:
        self.counts["restore"] += 1


class LeaseMachine(RuleBasedStateMachine):
    """Calls of leases in any order that an engine can have."""

    @initialize(
        seed=st.integers(0, 10**6),
        placement=st.sampled_from(PLACEMENTS),
        spare_rows=st.sampled_from(SPARE_ROWS),
    )
    def make(self, seed, placement, spare_rows=lease_module.SPARE_ROWS):
        lease_module.SPARE_ROWS = spare_rows
        rng = random.Random(seed)
        page_size, grid = rng.choice([(1, 1), (1, 4), (2, 4), (4, 4)])
        self.step = step = max(page_size, grid)
        self.is_hybrid = rng.random() < 0.9
        state_bytes = rng.choice([3, 5, 8]) * step * ROW_BYTES
        # A short memory for evictions and refusals, or one that holds several conversations.
        short, large = (rng.randint(10, 24), rng.randint(2, 6)), (64, 12)
        num_pages, num_slots = rng.choice([short, large])
        num_rows = step * num_pages
        sizes = {"num_kv_tokens": num_rows, "num_slots": num_slots}
        if rng.random() < 0.4:
            memory = rng.choice(["arena", "budget"])
            sizes = {"total_bytes": num_rows * ROW_BYTES + (num_slots + 1) * state_bytes}
            sizes["memory"] = memory
        if self.is_hybrid:
            for tier in ("host_bytes", "disk_bytes"):
                if rng.random() < 0.6:
                    sizes[tier] = 2 * state_bytes + rng.randint(1, 12) * step * ROW_BYTES
        config = CacheConfig(
            prefix_cache="hybrid" if self.is_hybrid else "radix",
            kv_bytes_per_token=ROW_BYTES,
            state_bytes=state_bytes,
            page_size=page_size,
            grid=grid,
            eviction=rng.choice(["lru", "survival", "survival", CustomPolicy, "gdsf"]),
            ghost_bytes=rng.choice([0, 4000, 1 << 20]),
            **sizes,
        )
        self.cache = build_prefix_cache(config)
        self.cache.policy.set_clock(lambda: float(self.num_requests))
        self.ledger = parse_placement(Ledger(placement))
        self.own_slots = 1000 if rng.random() < 0.3 else None
        self.outbox, self.router = Outbox(self.cache), self._router(config, placement)
        self.running: list[Running] = []
        self.tensors = Tensors()
        self.arrivals: list[ReceivedPrefix] = []
        self.num_requests = self.num_batches = self.num_saved = 0
        self.reached: Counter[str] = Counter()
        """Number of times that each kind of state was reached."""
        draw = np.random.default_rng(seed)
        self.texts: list[tuple[Tokens, int]] = []
        """Texts of earlier requests, each with the length of its prompt."""
        self.stems = [draw.integers(0, 9, 40 * step, dtype=np.int32) for _ in range(2)]

    def _router(self, config: CacheConfig, placement: str) -> CheckpointSeconds:
        spec = ReplicaSpec(
            PerToken(),
            page_size=config.page_size,
            grid=config.grid,
            kv_bytes=ROW_BYTES,
            state_bytes=config.state_bytes,
            stateful=self.is_hybrid,
            placement=parse_placement(placement),
        )
        router = CheckpointSeconds(spec)
        router.joined(0, 0.0)
        return router

    @rule(seed=st.integers(0, 10**6), num_operations=st.integers(1, 40))
    def many_operations(self, seed, num_operations):
        """Run many random operations, so that the memory fills up. Short examples rarely do."""
        rng = random.Random(seed)
        for _ in range(num_operations):
            dice, number = rng.random(), rng.randrange(4)
            if dice < 0.2:
                self.begin(rng.randrange(10**6))
            elif dice < 0.5:
                self.prefill(number, rng.randint(1, 24))
            elif dice < 0.7:
                self.decode(number, rng.randint(1, 6), rng.randint(1, 6), rng.random() < 0.5)
            elif dice < 0.75:
                self.plan(number, rng.randrange(60))
            elif dice < 0.88:
                self.end(number, rng.choice(ENDS))
            elif dice < 0.94:
                self.arrive(rng.randrange(10**6), rng.randrange(3))
            else:
                self.evict(rng.randint(0, 20), rng.randrange(2))
            self.invariants_hold()

    def text(self, rng: random.Random) -> tuple[Tokens, int]:
        """Return a text and the length of its prompt. It shares a prefix with others, or it is a
        beginning of an earlier text: the same prompt, or the next turn of its conversation."""
        if self.texts and rng.random() < 0.7:
            tokens, prompt_len = rng.choice(self.texts[-4:])
            turn = rng.choice([0, 0, rng.randint(1, self.step)])
            return tokens, min(prompt_len + turn, len(tokens) - 8)
        shared_len = rng.randint(0, 6) * self.step + rng.choice([0, 0, rng.randint(0, self.step)])
        fresh = np.random.default_rng(rng.randrange(40)).integers(0, 9, 30, dtype=np.int32)
        tokens = np.concatenate([rng.choice(self.stems)[:shared_len], fresh])
        most = min(len(tokens) - 8, shared_len + 2 * self.step)
        self.texts.append((tokens, rng.randint(min(self.step + 1, most), most)))
        return self.texts[-1]

    @rule(seed=st.integers(0, 10**6))
    def begin(self, seed):
        """Route a request and begin its lease."""
        if len(self.running) >= 4:
            return
        rng = random.Random(seed)
        tokens, prompt_len = self.text(rng)
        namespace = rng.choice([None, None, "tenant"])
        boundaries = tuple(sorted(rng.sample(range(1, prompt_len + 1), min(prompt_len, 2))))
        self.num_requests += 1
        routed = RouteRequest(self.num_requests, tokens[:prompt_len], namespace, boundaries)
        forecast = self.router.forecast(routed, 0, 0)
        assert self.router.forecast(routed, 0, 0) == forecast
        self.router.route(routed, float(self.num_requests))
        lease_request = LeaseRequest(
            tokens[:prompt_len],
            namespace,
            PromptBoundaries(boundaries, rng.random() < 0.8),
            reuse=rng.random() < 0.9,
            exact=rng.random() < 0.1,
            stateful=self.is_hybrid,
            own_slot=None if self.own_slots is None else self.own_slots + self.num_requests,
            table_row=rng.choice([None, self.num_requests]),
            returns_within_s=rng.choice([None, None, 2.0, 9.0]),
            session=rng.choice(["", "a", "b", "c"]),
        )
        exchange = rng.choice([None, Rate(0.0), Rate(0.05), Rate(9.0)])
        num_loaded = self.num_loaded_rows()
        lease = Lease.begin(self.cache, self.ledger, lease_request, exchange)
        assert not self.ledger.saved and not self.ledger.dropped
        self.reached["loaded"] += self.num_loaded_rows() > num_loaded
        self.reached["no memory"] += lease is None
        if lease is None:
            self.router.ended(self.num_requests, float(self.num_requests))
            return
        assert sum(lease.losses) + lease.cached_len == prompt_len and min(lease.losses) >= 0
        assert lease_request.reuse or not lease.cached_len
        self.reached["hit"] += lease.cached_len > 0
        self.reached.update(cause for cause, lost in lease.losses._asdict().items() if lost)
        loadable_len = lease.match.loadable[-1].position if lease.match.loadable else 0
        reached_len = lease.cached_len + lease.losses.refused  # a refused state can be offloaded
        assert lease.losses.not_fetched == max(loadable_len - reached_len, 0)
        assert lease_request.reuse or not (lease.losses.not_fetched or lease.match.loadable)
        start = lease.cached_len
        request = Running(self.num_requests, tokens, prompt_len, lease, start, lease_request.reuse)
        request.needs_restore = lease.match.checkpoint is not None and lease.state_slot is not None
        self.running.append(request)

    def num_loaded_rows(self) -> int:
        """Return the number of rows copied to the device so far."""
        copied = {} if self.cache.offload is None else self.cache.offload.copied_rows
        return sum(rows for (_, tier), rows in copied.items() if tier == DEVICE)

    def pick(self, number: int) -> Running | None:
        """Return a running request, or None if there is none."""
        return self.running[number % len(self.running)] if self.running else None

    def extend(self, request: Running, to_len: int) -> bool:
        """Extend the lease of ``request``. The first successful call counts the request."""
        prefills = self.ledger.prefills
        requests = self.cache.stats.total.requests
        extended = request.lease.extend(to_len)
        counts = extended and to_len > request.lease.cached_len and not request.is_counted
        assert self.ledger.prefills - prefills == int(counts and self.is_hybrid)
        assert self.cache.stats.total.requests - requests == int(counts and request.reuse)
        if counts:
            request.is_counted = True
            if self.is_hybrid:
                planned = {placed.position for placed in request.planned}
                wanted = self.ledger.planned
                request.planned.update(
                    placed for placed in wanted if placed.position not in planned
                )
                assert request.lease.planned == tuple(
                    sorted(one.position for one in request.planned)
                )
        assert request.lease.is_counted == (request.is_counted and request.reuse)
        return extended

    def settle(self, request: Running, inserted: int) -> None:
        """Check that the policy was notified of each checkpoint that the cache took."""
        saved, dropped = self.ledger.saved, self.ledger.dropped
        assert len(saved) == self.cache.stats.inserted_slots - inserted
        self.num_saved += len(saved)
        self.reached["saved"] += len(saved)
        self.reached["dropped"] += len(dropped)
        request.settled.update(
            placed for placed in (*saved, *dropped) if placed.label not in OWN_LABELS
        )
        saved.clear()
        dropped.clear()

    def carry_out(self, request: Running, to_len: int, how: int) -> None:
        """Carry out the step plan, and check that it cannot be omitted, taken or applied twice."""
        steps = self.cache.steps
        is_due = bool(steps.transfers or steps.restores or steps.due_row_writes())
        assert not request.needs_restore or is_due
        if request.needs_restore and to_len > request.lease.published_len:
            self.assert_refuses(request, to_len)
        plan = self.cache.take_step()
        assert bool(plan) == is_due
        if how == 2 and plan:
            refused("taken but not carried out", self.cache.check, kind=AssertionError)
            refused("taken but not carried out", self.cache.take_step, kind=RuntimeError)
            if to_len > request.lease.published_len:
                self.assert_refuses(request, to_len)
        plan.carry_out(self.tensors)
        for other in self.running:
            other.needs_restore = False
        if how == 3 and plan:
            with pytest.raises(RuntimeError, match="was carried out, failed half-way"):
                plan.carry_out(self.tensors)
        counts = self.tensors.counts
        assert counts["restore"] == len(plan.restores)
        assert counts["write_row"] == len(plan.row_writes)
        num_drops = sum(isinstance(transfer, Drop) for transfer in plan.transfers)
        assert counts["move"] + counts["copy"] == len(plan.transfers) - num_drops
        self.reached.update(counts)
        counts.clear()

    def assert_refuses(self, request: Running, to_len: int) -> None:
        """Check that nothing computed from another state can be published."""
        before = request.lease.published_len, self.cache.cached_tokens
        for call in (request.lease.publish, request.lease.finish, request.lease.preempt):
            with pytest.raises(RuntimeError, match=r"abort (this lease|all leases)"):
                call(request.tokens, to_len)
        assert (request.lease.published_len, self.cache.cached_tokens) == before

    @rule(number=st.integers(0, 3), size=st.integers(1, 24))
    def prefill(self, number, size):
        """Compute and publish a chunk of a prompt."""
        request = self.pick(number)
        if request is None or request.computed_len >= request.prompt_len:
            return
        start, end = request.computed_len, min(request.computed_len + size, request.prompt_len)
        if not self.extend(request, end):
            return
        if size % 3 == 0:
            request.lease.take_checkpoint_slots(start, end, 1)
        request.lease.take_checkpoint_slots(start, end)
        inserted = self.cache.stats.inserted_slots
        self.carry_out(request, end, size % 4)
        request.lease.publish(request.tokens, end)
        self.settle(request, inserted)
        request.computed_len = end
        if end == request.prompt_len:
            self.router.prefilled(request.id, float(self.num_requests))
            self.outbox.cover(request.id)

    @rule(
        number=st.integers(0, 3),
        drafted=st.integers(1, 6),
        accepted=st.integers(1, 6),
        unwritten=st.booleans(),
    )
    def decode(self, number, drafted, accepted, unwritten):
        """Compute a step of several draft tokens and accept the first ones."""
        request = self.pick(number)
        if request is None or request.computed_len < request.prompt_len:
            return
        start = request.computed_len
        end = min(start + drafted, len(request.tokens))
        if end == start or not self.extend(request, end):
            return
        request.lease.take_checkpoint_slots(start, end)
        request.computed_len = min(start + accepted, end)
        request.lease.roll_back(request.computed_len, unwritten)
        self.carry_out(request, request.computed_len, drafted % 4)
        if accepted == 3:
            inserted = self.cache.stats.inserted_slots
            request.lease.publish(request.tokens, request.computed_len)
            self.settle(request, inserted)

    @rule(number=st.integers(0, 3), position=st.integers(1, 60))
    def plan(self, number, position):
        """Plan a checkpoint on behalf of another request."""
        request = self.pick(number)
        if request is None or not self.is_hybrid or request.computed_len >= request.prompt_len:
            return
        before = request.lease.planned
        request.lease.plan_checkpoint(position, "requested")
        added = set(request.lease.planned) - set(before)
        assert added <= {position - position % self.step}
        request.planned.update(Placed(floored, "requested") for floored in added)

    @rule(number=st.integers(0, 3), how=st.sampled_from(ENDS))
    def end(self, number, how):
        request = self.pick(number)
        if request is None:
            return
        self.running.remove(request)
        inserted, lease = self.cache.stats.inserted_slots, request.lease
        cached_rows = lease.kv_indices[: lease.published_len]
        assert cached_rows.tolist() == self.cache.gather(lease.node).tolist()
        if how == "abort":
            request.lease.abort()
        elif how == "preempt":
            request.lease.preempt(request.tokens, request.computed_len)
        else:
            stop_reason = how if how == "session_end" else ""
            request.lease.finish(request.tokens, request.computed_len, stop_reason=stop_reason)
        self.settle(request, inserted)
        assert request.settled == request.planned, (
            "a planned checkpoint was not reported exactly once"
        )
        self.router.ended(request.id, float(self.num_requests))

    @rule(seed=st.integers(0, 10**6), how=st.integers(0, 2))
    def arrive(self, seed, how):
        """Begin, publish or abort an arrival of a prefix from another engine."""
        rng = random.Random(seed)
        if how and self.arrivals:
            arrival = self.arrivals.pop(seed % len(self.arrivals))
            arrival.publish() if how == 1 else arrival.abort()
            return
        tokens, _ = self.text(rng)
        whole = tokens[: len(tokens) // self.step * self.step]
        if len(whole) and len(self.arrivals) < 2:
            arrival = ReceivedPrefix.begin(self.cache, whole, None, stateful=self.is_hybrid)
            if arrival is not None:
                self.arrivals.append(arrival)

    @rule(num_tokens=st.integers(0, 20), num_slots=st.integers(0, 2))
    def evict(self, num_tokens, num_slots):
        self.cache.evict(num_tokens, num_slots)

    @rule()
    def deliver(self):
        """Deliver all pending event batches to the router."""
        self.outbox.flush()
        for batch in self.outbox.since(self.num_batches):
            self.router.on_events(0, *batch)
            self.num_batches += 1
        assert self.router.mirrors[0].num_tokens == self.cache.cached_tokens
        assert self.router.mirrors[0].num_checkpoints == self.cache.num_checkpoints
        self.router.check()

    @invariant()
    def invariants_hold(self):
        if not hasattr(self, "cache"):
            return
        holders = [*(request.lease for request in self.running), *self.arrivals]
        self.cache.check(
            sum(holder.held_tokens for holder in holders),
            sum(holder.held_slots for holder in holders),
        )
        for rule_ in self.ledger.rules[0].rules:
            if isinstance(rule_, Adaptive):
                assert sum(one.placed - 1 for one in rule_._accounts.values()) == self.num_saved

    def teardown(self):
        lease_module.SPARE_ROWS = SPARE_ROWS[-1]
        if not hasattr(self, "cache"):
            return
        while self.running:
            self.end(0, "abort")
        while self.arrivals:
            self.arrivals.pop().abort()
        self.invariants_hold()
        self.deliver()
        usage = self.cache.stats.total
        lost = usage.never_seen + usage.kv_evicted + usage.checkpoint_evicted
        lost += usage.never_checkpointed + usage.below_grid + usage.refused + usage.not_fetched
        assert usage.prompt_tokens == usage.cached_tokens + lost


def test_leases_leak_nothing_and_account_for_every_token():
    # No shrinking: ``many_operations`` takes a seed, so smaller draws are not simpler runs.
    phases = (Phase.explicit, Phase.reuse, Phase.generate)
    run_state_machine_as_test(LeaseMachine, settings=settings(at_least(40), phases=phases))


def test_the_machine_reaches_hits_loads_and_refusals():
    """Without this, random requests could pass every check because none of them hits."""
    reached: Counter[str] = Counter()
    for seed in range(40):
        machine = LeaseMachine()
        machine.make(seed=seed, placement=PLACEMENTS[seed % len(PLACEMENTS)])
        for number in range(4):
            machine.many_operations(seed=1000 * seed + number, num_operations=40)
        machine.teardown()
        reached += machine.reached
    assert reached["hit"] >= 100 and reached["restore"] >= 100
    least = dict.fromkeys(("loaded", "refused", "not_fetched", "no memory", "copy", "move"), 5)
    least |= dict.fromkeys(("saved", "dropped", "kv_evicted", "never_checkpointed"), 50)
    assert all(reached[name] >= number for name, number in least.items()), reached
