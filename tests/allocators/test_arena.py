"""Arena allocator: KV rows and state slots share memory, and moves of rows preserve the data."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hybridcache.allocators.moves import Move, StepQueue
from hybridcache.allocators.pools import ArenaAllocator, slab_rows
from tests.refused import refused

ROW_BYTES = 3


class RowHolder:
    """Owner of rows that renames them when they move."""

    def __init__(self, rows):
        self.rows = rows
        self.tag = None

    def rows_moved(self, move):
        return len(move.rename(self.rows))


def take_transfers(queue):
    """Take the step plan, mark it as carried out and return its transfers."""
    plan = queue.take()
    plan.done()
    return plan.transfers


class ArenaMachine(RuleBasedStateMachine):
    """Rows and slots, compared with a memory of one number per row.

    The memory changes once per step, in the order of the arena's docstring: moves, copies of
    states, then the writes of the step.
    """

    @initialize(
        page_size=st.sampled_from([1, 2, 4]),
        state_bytes=st.integers(1, 60),
        total_bytes=st.integers(3 * 4, 700),
    )
    def make(self, page_size, state_bytes, total_bytes):
        self.arena = arena = ArenaAllocator(total_bytes, ROW_BYTES, state_bytes, page_size)
        assert arena.slab_rows == slab_rows(state_bytes, ROW_BYTES, page_size)
        assert arena.num_slabs == arena.capacity // arena.slab_rows
        self.memory = np.full(arena.capacity, -1, np.int64)
        self.moves = StepQueue()
        arena.holders[self.moves] = None
        self.holders: list[RowHolder] = []
        self.states: dict[int, int | None] = {}
        """Tag of each slot, or None if it is not written yet."""
        self.copies: dict[int, int] = {}
        """Slot of a resuming request -> the locked checkpoint that it must copy."""
        self.num_tags = 0

    def new_tag(self):
        self.num_tags += 1
        return self.num_tags

    @property
    def free_rows(self):
        taken = sum(len(holder.rows) for holder in self.holders)
        return self.arena.capacity - taken - len(self.states) * self.arena.slab_rows

    @rule(num_tokens=st.integers(0, 90))
    def allocate_rows(self, num_tokens):
        page_size = self.arena.page_size
        whole = -(-num_tokens // page_size) * page_size
        fits = whole <= self.free_rows
        rows = self.arena.allocate(num_tokens)
        assert (rows is not None) == fits
        if rows is not None:
            assert rows.dtype == np.int32 and len(rows) == whole
            steps = rows.reshape(-1, page_size) - rows[::page_size, None]
            assert (steps == np.arange(page_size)).all() and not (
                rows[::page_size] % page_size
            ).any()
            holder = RowHolder(rows)
            self.holders.append(holder)
            self.arena.holders[holder] = None

    @rule(checkpoint=st.integers(0, 9))
    def allocate_slot(self, checkpoint):
        fits = self.free_rows >= self.arena.slab_rows
        before = self.arena.num_moves, self.arena.num_moved_rows, len(self.moves.transfers)
        slot = self.arena.slots.allocate()
        assert (slot is not None) == fits
        moves = self.moves.transfers[before[2] :]
        assert self.arena.num_moves - before[0] == len(moves) <= 1
        assert self.arena.num_moved_rows - before[1] == sum(len(move.src) for move in moves)
        if slot is not None:
            assert slot not in self.states
            written = [s for s, tag in self.states.items() if tag is not None]
            self.states[slot] = None
            if checkpoint < len(written):
                self.copies[slot] = written[checkpoint]

    @rule(seed=st.integers(0, 10**6), num_operations=st.integers(1, 60))
    def many_operations(self, seed, num_operations):
        """Run many random operations, so that the memory fills up. Short examples rarely do."""
        rng = random.Random(seed)
        for _ in range(num_operations):
            dice, number = rng.random(), rng.randrange(1000)
            if dice < 0.35:
                self.allocate_rows(rng.choice((1, 3, 10, 40)))
            elif dice < 0.6:
                self.free_part_of_a_holder(number, rng.randrange(20))
            elif dice < 0.8:
                self.allocate_slot(rng.randrange(4))
            elif dice < 0.95:
                self.free_slot(number)
            else:
                self.step()
            self.each_row_is_free_or_taken()

    @rule(number=st.integers(0, 99), num_kept=st.integers(0, 20))
    def free_part_of_a_holder(self, number, num_kept):
        if not self.holders:
            return
        holder = self.holders[number % len(self.holders)]
        kept = min(num_kept * self.arena.page_size, len(holder.rows))
        self.arena.free(holder.rows[kept:])
        holder.rows = holder.rows[:kept].copy()
        if kept:
            return
        self.holders.remove(holder)
        del self.arena.holders[holder]

    @rule(number=st.integers(0, 99))
    def free_slot(self, number):
        unlocked = sorted(set(self.states) - set(self.copies.values()))
        if not unlocked:
            return
        slot = unlocked[number % len(unlocked)]
        del self.states[slot]
        self.copies.pop(slot, None)
        self.arena.slots.free(slot)

    @rule()
    def step(self):
        """Apply moves, copies and writes to the memory, then check its contents."""
        memory, size = self.memory, self.arena.slab_rows
        for move in take_transfers(self.moves):
            assert not set(move.src) & set(move.dst)
            assert len(set(move.dst)) == len(move.dst) == len(move.src)
            assert set((move.src // size).tolist()) <= {move.slab}
            memory[move.dst] = memory[move.src]
        for own, checkpoint in self.copies.items():
            memory[own * size : (own + 1) * size] = memory[
                checkpoint * size : (checkpoint + 1) * size
            ]
            self.states[own] = self.states[checkpoint]
        self.copies.clear()
        for holder in self.holders:
            if holder.tag is None:
                holder.tag = self.new_tag()
                memory[holder.rows] = holder.tag * 1000 + np.arange(len(holder.rows))
        for slot, tag in self.states.items():
            if tag is None:
                self.states[slot] = self.new_tag()
                memory[slot * size : (slot + 1) * size] = self.states[slot]
        for holder in self.holders:
            expected = holder.tag * 1000 + np.arange(len(holder.rows))
            assert (memory[holder.rows] == expected).all(), "a row was moved wrongly or overwritten"
        for slot, tag in self.states.items():
            assert (memory[slot * size : (slot + 1) * size] == tag).all(), "a state was overwritten"

    @invariant()
    def each_row_is_free_or_taken(self):
        if not hasattr(self, "arena"):
            return
        arena = self.arena
        arena.check()
        arena.slots.check()
        held = np.concatenate([np.empty(0, np.int32), *(holder.rows for holder in self.holders)])
        arena.check_taken(held)
        state_rows = [
            np.arange(s * arena.slab_rows, (s + 1) * arena.slab_rows) for s in self.states
        ]
        all_rows = np.sort(np.concatenate([held, arena.free_rows(), *state_rows]))
        assert all_rows.tolist() == list(range(arena.capacity))
        living = np.bincount(held // arena.slab_rows, minlength=arena.num_slabs)
        assert arena.occupancy().tolist() == living[: arena.num_slabs].tolist()
        assert arena.num_free == self.free_rows
        assert arena.num_taken == len(held)
        assert arena.slots.num_taken == len(self.states)
        assert arena.slots.num_free == self.free_rows // arena.slab_rows
        assert set(arena.slots.free_slots()).isdisjoint(self.states)


TestArena = ArenaMachine.TestCase


def rows_in(arena, num_rows):
    """Register and return a holder of ``num_rows`` new rows."""
    holder = RowHolder(arena.allocate(num_rows))
    arena.holders[holder] = None
    return holder


def test_moves_are_taken_once_and_in_order():
    """The only check that detects the reverse order (``tests/faults``)."""
    steps, rows = StepQueue(), np.empty(0, np.int32)
    for slab in (3, 1, 2):
        assert steps.rows_moved(Move(slab, rows, rows, rows)) == 0
    assert steps.num_moves == 3
    plan = steps.take()
    plan.done()
    assert [move.slab for move in plan.transfers] == [3, 1, 2]
    assert not steps.take() and steps.num_moves == 0
    steps.rows_moved(plan.transfers[0])
    assert steps.take_transfers() == plan.transfers[:1]
    assert not steps.transfers and steps.num_moves == 0


def test_moving_rows_without_a_holder_raises():
    arena = ArenaAllocator(20, 1, 10)
    rows = arena.allocate(10)
    others = rows_in(arena, 10)
    arena.free(rows[:5])
    arena.free(others.rows[:5])
    others.rows = others.rows[5:].copy()
    refused("holders claim", arena.slots.allocate, kind=RuntimeError)


def test_an_opened_slab_is_used_after_all_other_holes():
    """A row is the unit: five slabs of ten rows. Few rows then move to empty the last one."""
    arena = ArenaAllocator(50, 1, 10)
    first = arena.allocate(8)
    occupancies = [arena.occupancy().tolist()]
    for num_rows in (4, 7):
        arena.allocate(num_rows)
        occupancies.append(arena.occupancy().tolist())
    arena.free(first[:3])
    arena.allocate(5)
    occupancies.append(arena.occupancy().tolist())
    used = [sorted(each, reverse=True) for each in occupancies]
    assert used == [[8, 0, 0, 0, 0], [10, 2, 0, 0, 0], [10, 9, 0, 0, 0], [10, 10, 1, 0, 0]]


def test_a_slab_has_whole_pages_and_fits_one_state():
    assert [slab_rows(12, 2), slab_rows(13, 2), slab_rows(13, 2, 4)] == [6, 7, 8]
    arena = ArenaAllocator(407, 2, 13, 4)
    assert (arena.slab_rows, arena.capacity) == (8, 200)
