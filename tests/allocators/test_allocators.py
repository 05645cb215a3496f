"""Page and slot allocators: each index is free or allocated once, with and without a budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hybridcache.allocators import pools as allocators_pages
from hybridcache.allocators.pools import MAX_ROWS, ByteBudget, PageAllocator, SlotAllocator
from tests.refused import refused

TOKEN_BYTES, SLOT_BYTES = 2, 37


class AllocatorMachine(RuleBasedStateMachine):
    """Page and slot allocators, optionally under one budget, compared with lists of allocations."""

    @initialize(
        page_size=st.sampled_from([1, 16, 64, 256]),
        num_pages=st.integers(0, 12),
        num_slots=st.integers(0, 6),
        total_bytes=st.none() | st.integers(1, 6000),
        block=st.sampled_from([1, 3, allocators_pages.BLOCK]),
    )
    def make(self, page_size, num_pages, num_slots, total_bytes, block):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(allocators_pages, "BLOCK", block)
        budget = None if total_bytes is None else ByteBudget(total_bytes)
        self.budget = budget
        self.page_size = page_size
        self.pages = PageAllocator(num_pages * page_size, page_size, TOKEN_BYTES, budget)
        self.slots = SlotAllocator(num_slots, SLOT_BYTES, budget)
        self.rows: list[np.ndarray] = []
        self.taken: list[int] = []

    def free_bytes(self):
        held = sum(map(len, self.rows)) * TOKEN_BYTES + len(self.taken) * SLOT_BYTES
        return None if self.budget is None else self.budget.total_bytes - held

    @rule(num_tokens=st.integers(0, 600))
    def allocate_rows(self, num_tokens):
        whole = -(-num_tokens // self.page_size) * self.page_size
        held = sum(map(len, self.rows))
        fits = whole <= self.pages.capacity - held
        if self.budget is not None:
            fits &= whole * TOKEN_BYTES <= self.free_bytes()
        rows = self.pages.allocate(num_tokens)
        assert (rows is not None) == fits
        if rows is not None:
            assert rows.dtype == np.int32 and len(rows) == whole
            starts = rows[:: self.page_size]
            assert (starts % self.page_size == 0).all()
            steps = rows.reshape(-1, self.page_size) - starts[:, None]
            assert (steps == np.arange(self.page_size)).all(), "a page is consecutive rows"
            self.rows.append(rows)

    @rule()
    def allocate_slot(self):
        fits = len(self.taken) < self.slots.capacity
        if self.budget is not None:
            fits &= self.free_bytes() >= SLOT_BYTES
        slot = self.slots.allocate()
        assert (slot is not None) == fits
        if slot is not None:
            self.taken.append(slot)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def free_rows(self, data):
        self.pages.free(self.rows.pop(data.draw(st.integers(0, len(self.rows) - 1))))

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def free_slot(self, data):
        self.slots.free(self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1))))

    @invariant()
    def each_index_is_free_or_allocated(self):
        if not hasattr(self, "pages"):
            return
        self.pages.check()
        self.slots.check()
        held = np.concatenate([np.empty(0, np.int32), *self.rows])
        all_rows = np.sort(np.concatenate([held, self.pages.free_rows()]))
        assert all_rows.dtype == np.int32 and all_rows.tolist() == list(range(self.pages.capacity))
        slots = sorted(self.taken + self.slots.free_slots())
        assert slots == list(range(self.slots.capacity))
        if self.budget is not None:
            assert self.budget.free_bytes == self.free_bytes() >= 0
            affordable = self.free_bytes() // TOKEN_BYTES // self.page_size * self.page_size
            assert self.pages.num_free == min(self.pages.num_unused, affordable)
            affordable = self.free_bytes() // SLOT_BYTES
            assert self.slots.num_free == min(self.slots.num_unused, affordable)
        else:
            assert self.pages.num_free == self.pages.capacity - len(held)
            assert self.slots.num_free == self.slots.capacity - len(self.taken)

    def teardown(self):
        if hasattr(self, "patch"):
            self.patch.undo()


TestAllocators = AllocatorMachine.TestCase


def test_memory_of_the_stack_depends_on_the_allocated_pages():
    """A disk tier of 200 GiB has hundreds of millions of rows, and is mostly empty."""
    pages = PageAllocator(MAX_ROWS - MAX_ROWS % 4, page_size=4)
    rows = pages.allocate(1000)
    assert len(pages._stack) == MAX_ROWS // 4 and rows is not None
    assert pages._num_implied == len(pages._stack) - allocators_pages.BLOCK
    pages.free(rows)
    assert pages.num_free == pages.capacity
    full = PageAllocator(4 * allocators_pages.BLOCK)
    full._stack[:] = -1
    assert all(full.allocate(1024) is not None for _ in range(4 * allocators_pages.BLOCK // 1024))
    assert full.num_free == 0 and {*full._stack[allocators_pages.BLOCK :].tolist()} == {-1}


@pytest.mark.parametrize("budget", [None, 1000])
def test_an_invalid_call_changes_nothing(budget):
    refused("total_bytes must be at least 1", ByteBudget, 0)
    shared = None if budget is None else ByteBudget(budget)
    pages = PageAllocator(16, 4, TOKEN_BYTES, shared)
    slots = SlotAllocator(2, SLOT_BYTES, shared)
    rows, slot = pages.allocate(8), slots.allocate()
    for bad, error in ((-5, ValueError), (2.5, TypeError), (4.0, TypeError), ("4", TypeError)):
        with pytest.raises(error):
            pages.allocate(bad)
    for bad, error in ((1.0, TypeError), (None, TypeError), (-1, ValueError), (2, ValueError)):
        with pytest.raises(error):
            slots.free(bad)
    assert (pages.num_taken, slots.num_taken) == (8, 1)
    assert shared is None or shared.free_bytes == budget - 8 * TOKEN_BYTES - SLOT_BYTES
    pages.free(rows)
    slots.free(slot)
    other = slots.allocate(), slots.allocate()
    slots.free(other[0])
    refused("not taken", slots.free, other[0])
    slots.free(other[1])
    assert (pages.num_free, slots.num_free) == (16, 2)
    pages.check()
    slots.check()


def test_pool_size_is_limited_by_int32_indices() -> None:
    page = 1 << 20
    assert PageAllocator(MAX_ROWS, page).num_free == MAX_ROWS
    refused("int32 can number", PageAllocator, MAX_ROWS + page, page)
