"""State machine: leases on an arena read the rows written for their tokens, despite moves.

Each decision must equal that of a budget cache in which a state has the size of its slab.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from hybridcache.config import CacheConfig, build_prefix_cache
from hybridcache.lease import Lease, LeaseRequest
from hybridcache.policies.registry import EVICTION, parse_placement
from hybridcache.tokens import Tokens
from tests.cache.serving import carried_out
from tests.cache.test_machine import at_least
from tests.cache.twins import Twins

GRID = 4
ROW_BYTES = 2
PLACEMENT = "every:8,backoff,end"
ENDS = ("finish", "finish", "preempt", "abort")


def content(tokens: Tokens, length: int) -> int:
    """Return the content of a KV row at ``length - 1`` or a state at ``length``: a prefix hash."""
    return hash(tokens[:length].tobytes()) & (2**62 - 1)


@dataclass(eq=False)
class Running:
    """Request with a lease on the arena, a twin lease on the budget, and a request table row."""

    tokens: Tokens
    prompt_len: int
    lease: Lease
    twin: Lease
    table: np.ndarray
    table_row: int
    computed_len: int
    """Length that is published, or will be when its step is committed."""
    launched_len: int
    extended_len: int
    exports: tuple[tuple[int, int], ...] = ()
    launched: list[int] = field(default_factory=list)
    """End positions of the steps in flight."""


class ArenaLeaseMachine(RuleBasedStateMachine):
    """Leases scheduled, launched and committed in any order that an engine with overlap can have.

    The memory has one number per row.
    """

    eviction = "lru"

    @initialize(
        page_size=st.sampled_from([1, 2, 4]),
        state_rows=st.integers(3, 12),
        num_rows=st.integers(40, 110),
        seed=st.integers(0, 9),
    )
    def make(self, page_size, state_rows, num_rows, seed):
        shape = {"page_size": page_size, "grid": GRID, "eviction": self.eviction}
        self.cache = build_prefix_cache(
            CacheConfig(
                total_bytes=num_rows * ROW_BYTES,
                kv_bytes_per_token=ROW_BYTES,
                state_bytes=state_rows * ROW_BYTES - 1,
                memory="arena",
                **shape,
            )
        )
        self.arena = arena = self.cache.arena
        self.twin = build_prefix_cache(
            CacheConfig(
                total_bytes=arena.capacity * ROW_BYTES,
                kv_bytes_per_token=ROW_BYTES,
                state_bytes=arena.slab_rows * ROW_BYTES,
                **shape,
            )
        )
        # Policies weigh items by the configured state size: make it the same for both.
        self.cache.item_bytes = self.twin.item_bytes
        self.num_begun = 0
        self.memory = np.full(arena.capacity, -1, np.int64)
        self.running: list[Running] = []
        rng = np.random.default_rng(seed)
        self.systems = [rng.integers(0, 50, 12, dtype=np.int32) for _ in range(2)]
        self.placements = parse_placement(PLACEMENT), parse_placement(PLACEMENT)

    @rule(seed=st.integers(0, 10**6), num_operations=st.integers(1, 60))
    def many_operations(self, seed, num_operations):
        """Run many random operations, so that the memory fills up. Short examples rarely do."""
        rng = random.Random(seed)
        for _ in range(num_operations):
            dice, number = rng.random(), rng.randrange(3)
            if dice < 0.15:
                self.begin(number, rng.randrange(3), rng.randint(1, 24))
            elif dice < 0.45:
                self.schedule(number, rng.randint(1, 20))
            elif dice < 0.7:
                self.launch()
            elif dice < 0.9:
                self.commit(number)
            elif dice < 0.98:
                self.end(number, rng.choice(ENDS))
            else:
                self.evict(rng.randint(0, 30), rng.randrange(2))
            self.invariants_hold()

    @rule(number=st.integers(0, 1), seed=st.integers(0, 2), length=st.integers(1, 24))
    def begin(self, number, seed, length):
        if len(self.running) >= 3:
            return
        rng = np.random.default_rng(seed)
        system = self.systems[number % 2]
        tokens = np.concatenate((system, rng.integers(0, 50, 40, dtype=np.int32)))
        prompt_len = min(len(system) + length, len(tokens) - 8)
        self.num_begun += 1
        lease_request = LeaseRequest(tokens[:prompt_len], table_row=self.num_begun)
        lease = Lease.begin(self.cache, self.placements[0], lease_request)
        twin = Lease.begin(self.twin, self.placements[1], lease_request)
        assert (lease is None) == (twin is None)
        if lease is None:
            return
        assert lease.cached_len == twin.cached_len and lease.losses == twin.losses
        assert (lease.match.checkpoint is None) == (twin.match.checkpoint is None)
        table = np.full(len(tokens) + self.cache.page_size, -1, np.int32)
        start = lease.cached_len
        row = self.num_begun
        self.running.append(
            Running(tokens, prompt_len, lease, twin, table, row, start, start, start)
        )

    def pick(self, number):
        """Return a running request, or None if there is none."""
        return self.running[number % len(self.running)] if self.running else None

    @rule(number=st.integers(0, 2), size=st.integers(1, 20))
    def schedule(self, number, size):
        """Allocate rows and checkpoint slots for the next chunk of a request."""
        request = self.pick(number)
        if request is None or request.extended_len > request.launched_len:
            return
        start = request.launched_len
        limit = (
            request.prompt_len
            if start < request.prompt_len
            else min(start + 1, len(request.tokens))
        )
        end = min(start + size, limit)
        if end < request.prompt_len:
            end = max(start + 1, end // GRID * GRID) if end // GRID * GRID > start else end
        if end <= start:
            return
        extended = request.lease.extend(end)
        assert extended == request.twin.extend(end)
        if not extended:
            return
        request.exports = request.lease.take_checkpoint_slots(start, end)
        positions = [position for position, _ in request.exports]
        assert positions == [
            position for position, _ in request.twin.take_checkpoint_slots(start, end)
        ]
        request.extended_len = end

    @rule()
    def launch(self):
        """Apply the step plan in order, then read and write like a step."""
        memory, size = self.memory, self.arena.slab_rows
        tables = {request.table_row: request.table for request in self.running}
        carried_out(self.twin)
        plan = self.cache.take_step()
        for move in plan.transfers:
            memory[move.dst] = memory[move.src]
        for write in plan.row_writes:
            table = tables[write.table_row]
            new = write.up_to(len(table)).kv_indices
            table[write.start : write.start + len(new)] = new
        for checkpoint, own in plan.restores:
            memory[own * size : (own + 1) * size] = memory[
                checkpoint * size : (checkpoint + 1) * size
            ]
        plan.done()
        for request in self.running:
            start, end = request.launched_len, request.extended_len
            if start == end:
                continue
            tokens, rows, own = request.tokens, request.table, request.lease.state_slot
            expected = [content(tokens, position + 1) for position in range(start)]
            assert memory[rows[:start]].tolist() == expected, "a request reads rows of other tokens"
            if start:
                assert set(memory[own * size : (own + 1) * size]) == {content(tokens, start)}
            for position in range(start, end):
                memory[rows[position]] = content(tokens, position + 1)
            memory[own * size : (own + 1) * size] = content(tokens, end)
            for position, slot in request.exports:
                memory[slot * size : (slot + 1) * size] = content(tokens, position)
            request.exports = ()
            request.launched_len = end
            request.launched.append(end)

    @rule(number=st.integers(0, 2))
    def commit(self, number):
        """Publish the oldest launched step of a request."""
        request = self.pick(number)
        if request is None or not request.launched:
            return
        request.computed_len = request.launched.pop(0)
        changed = request.lease.publish(request.tokens, request.computed_len)
        assert changed == request.twin.publish(request.tokens, request.computed_len)

    @rule(number=st.integers(0, 2), how=st.sampled_from(ENDS))
    def end(self, number, how):
        request = self.pick(number)
        if request is None:
            return
        self.running.remove(request)
        is_idle = request.computed_len == request.extended_len
        for lease in (request.lease, request.twin):
            if how == "abort" or not is_idle:
                lease.abort()
            elif how == "finish":
                lease.finish(request.tokens, request.computed_len)
            else:
                lease.preempt(request.tokens, request.computed_len)

    @rule(num_tokens=st.integers(0, 30), num_slots=st.integers(0, 2))
    def evict(self, num_tokens, num_slots):
        assert self.cache.evict(num_tokens, num_slots) == self.twin.evict(num_tokens, num_slots)

    @invariant()
    def invariants_hold(self):
        if not hasattr(self, "cache"):
            return
        leases = [request.lease for request in self.running]
        held = sum(lease.held_tokens for lease in leases), sum(le.held_slots for le in leases)
        self.cache.check(*held)
        self.twin.check(*held)
        assert self.cache.cached_tokens == self.twin.cached_tokens
        assert self.cache.num_checkpoints == self.twin.num_checkpoints
        assert set(leases) == {one for one in self.cache.arena.holders if isinstance(one, Lease)}


class EveryPolicyArenaMachine(ArenaLeaseMachine):
    eviction = "survival"


@pytest.mark.parametrize("machine", [ArenaLeaseMachine, EveryPolicyArenaMachine])
def test_leases_read_the_rows_and_states_written_for_their_tokens(machine):
    run_state_machine_as_test(machine, settings=at_least(60))


def arena_twins(rng: random.Random) -> Twins:
    """Build a small random arena cache with its plain twin."""
    page_size, grid = rng.choice((1, 2, 4)), rng.choice((1, 4))
    unit = max(page_size, grid)
    return Twins(
        CacheConfig(
            page_size=page_size,
            grid=grid,
            total_bytes=ROW_BYTES * unit * rng.randint(20, 50),
            kv_bytes_per_token=ROW_BYTES,
            state_bytes=ROW_BYTES * unit * rng.randint(2, 8) - 1,
            memory="arena",
            eviction=rng.choice(("lru", "lru", *EVICTION)),
            priority_classes=rng.random() < 0.7,
            ghost_bytes=rng.choice((0, 2000, 1 << 20)),
        )
    )


def serve_twins(twins: Twins, rng: random.Random, num_operations: int) -> None:
    """Run random operations: begin, publish and end requests, hold rows and slots, and free
    them."""
    unit, step = max(twins.config.page_size, twins.config.grid), twins.cache._step
    for _ in range(num_operations):
        dice = rng.random()
        request = rng.choice(twins.requests) if twins.requests else None
        if dice < 0.3 and len(twins.requests) < 3:
            blocks = [rng.randrange(3) for _ in range(rng.randint(1, 5))]
            twins.begin(np.repeat(np.array(blocks, np.int32), unit), rng.choice((None, "tenant")))
        elif dice < 0.65 and request is not None:
            length = rng.randint(request.published_len, len(request.tokens))
            positions = {rng.randint(0, length // step) * step for _ in range(rng.randint(0, 2))}
            twins.publish(request, length, sorted(positions), rng.random() < 0.5)
        elif dice < 0.85 and request is not None:
            twins.end(request)
        elif dice < 0.89:
            rows = twins.allocate_kv(rng.randint(1, 3) * twins.config.page_size)
            if rows is not None:
                twins.held_rows.append(rows)
        elif dice < 0.93 and twins.held_rows:
            twins.free_kv(twins.held_rows.pop(0))
        elif dice < 0.96:
            twins.allocate_slot()
        elif twins.held_slots:
            twins.free_slot(twins.held_slots[0])
        twins.check()


@pytest.mark.full("0", "1", "2", "3")
@pytest.mark.parametrize("seed", range(12))
def test_a_full_arena_agrees_with_its_plain_twin(seed):
    rng, num_moves = random.Random(seed), 0
    for _ in range(3):
        twins = arena_twins(rng)
        serve_twins(twins, rng, num_operations=120)
        num_moves += twins.arena(twins.cache).num_moves
    assert num_moves > 0, "no row moved, so this test proves nothing"
