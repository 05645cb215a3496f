"""Allocators of KV rows in whole pages and of state slots, and the byte budget they can share."""

from __future__ import annotations

import numpy as np

from hybridcache.tokens import Indices, require_index

MAX_ROWS = 1 << 31
"""Number of rows or slots that int32 can number."""


class ByteBudget:
    """Counter of free bytes, which the allocators that share it change."""

    def __init__(self, total_bytes: int) -> None:
        """Raise ValueError if ``total_bytes`` is not positive."""
        self.total_bytes = self.free_bytes = require_index(total_bytes, "total_bytes", 1)


class BaseAllocator:
    """Allocator of units of one kind from a fixed range of indices, each with one owner at a time.

    With a ``budget``, several allocators share one number of bytes, and each can allocate only the
    rest. Allocators evict nothing: they return None if a request does not fit.
    """

    page_size = 1
    """Units that are allocated together."""

    def __init__(self, capacity: int, unit_bytes: int, budget: ByteBudget | None):
        """Raise ValueError for more units than int32 can number. Sizes are trusted otherwise:
        ``CacheConfig`` checks them. A ``budget`` needs ``unit_bytes``."""
        if capacity > MAX_ROWS:
            raise ValueError(
                f"{capacity} rows or slots are more than the {MAX_ROWS} that int32 can number"
            )
        self.capacity = capacity
        """Total number of units."""
        self.unit_bytes = unit_bytes
        self.budget = budget
        self.num_taken = 0
        """Number of allocated units."""

    @property
    def num_unused(self) -> int:
        """Number of unallocated units, even if the budget does not allow to take them. O(1)."""
        return self.capacity - self.num_taken

    @property
    def num_free(self) -> int:
        """Number of units that ``allocate`` can return now, rows in whole pages. O(1)."""
        num_unused, budget = self.capacity - self.num_taken, self.budget
        if budget is None:
            return num_unused
        affordable = budget.free_bytes // self.unit_bytes
        return min(num_unused, affordable - affordable % self.page_size)


BLOCK = 1 << 16
"""Minimum number of pages that are written to the stack together."""


def are_distinct(rows: Indices) -> bool:
    """Return True if no number occurs twice. O(len(rows) + max(rows)), for numbers from 0."""
    return len(rows) == 0 or bool(np.bincount(rows).max() == 1)


class PageAllocator(BaseAllocator):
    """Stack of free pages. A page is ``page_size`` consecutive KV rows.

    Capacity and counts are in rows (tokens). The stack is one int32 array with its height, so that
    taking or freeing many pages is one copy. Its lowest ``_num_implied`` entries are equal to their
    positions and not written, because a disk tier has many rows and is mostly empty.

    >>> pages = PageAllocator(8, page_size=4)
    >>> rows = pages.allocate(5)
    >>> len(rows), pages.num_free
    (8, 0)
    >>> pages.allocate(1) is None
    True
    >>> pages.free(rows)
    >>> pages.num_free
    8
    """

    def __init__(
        self,
        num_tokens: int,
        page_size: int = 1,
        token_bytes: int = 0,
        budget: ByteBudget | None = None,
    ) -> None:
        """``num_tokens`` are whole pages."""
        super().__init__(num_tokens, token_bytes, budget)
        self.page_size = page_size
        num_pages = num_tokens // page_size
        self._stack = np.empty(num_pages, dtype=np.int32)
        self._height = self._num_implied = num_pages
        self._offsets = np.arange(page_size, dtype=np.int32)

    def allocate(self, num_tokens: int) -> Indices | None:
        """Return rows for ``num_tokens`` tokens, rounded up to whole pages: int32[n]. O(n).

        Returns None if that many are not free. Raises ValueError for a negative number.
        """
        num_pages = -(-num_tokens // self.page_size)
        top = self._height
        if num_pages > top:
            return None
        if num_tokens < 0:
            raise ValueError(f"num_tokens must not be negative (got {num_tokens}).")
        if self.budget is not None and num_pages * self.page_size > self.num_free:
            return None
        if top - num_pages < self._num_implied:
            first = max(0, min(top - num_pages, self._num_implied - BLOCK))
            self._stack[first : self._num_implied] = np.arange(first, self._num_implied)
            self._num_implied = first
        pages = self._stack[top - num_pages : top]
        num_rows = len(pages) * self.page_size
        if self.budget is not None:
            self.budget.free_bytes -= num_rows * self.unit_bytes
        self.num_taken += num_rows
        self._height = top - len(pages)
        return pages.copy() if self.page_size == 1 else self.rows_of(pages)

    def rows_of(self, pages: Indices) -> Indices:
        """Return the rows of ``pages``: int32[n * page_size]."""
        if self.page_size == 1:
            return pages
        return (pages[:, None] * self.page_size + self._offsets).reshape(-1)

    def _free_pages(self) -> Indices:
        """Return all free pages, unordered. O(capacity)."""
        implied = np.arange(self._num_implied, dtype=np.int32)
        return np.concatenate([implied, self._stack[self._num_implied : self._height]])

    def free(self, rows: Indices) -> None:
        """Return ``rows``, which were allocated, to the pool: whole pages in row order. O(n).

        Nothing is checked: ``check`` finds pages that were free already.
        """
        if self.budget is not None:
            self.budget.free_bytes += len(rows) * self.unit_bytes
        self.num_taken -= len(rows)
        pages = rows
        if self.page_size > 1:
            pages = rows[:: self.page_size] // self.page_size
        bottom = self._height
        self._height = top = bottom + len(pages)
        self._stack[bottom:top] = pages

    def free_rows(self) -> Indices:
        """Return all unused rows, unordered: int32[num_unused]. O(capacity)."""
        return self.rows_of(self._free_pages())

    def check(self, num_reserved: int = 0) -> None:
        """Check that every free page is in range and listed once. ``num_reserved`` unused rows are
        not free. O(capacity)."""
        free = self._free_pages()
        assert 0 <= self._height <= len(self._stack), f"stack height {self._height}"
        if len(free):
            assert free.min() >= 0 and free.max() < len(self._stack), "a page is out of range"
        assert are_distinct(free), "a KV page is free twice"
        num_free = len(free) * self.page_size
        counted = self.num_unused - num_reserved
        assert num_free == counted, f"{num_free} rows free, counted {counted}"


class SlotAllocator(BaseAllocator):
    """Stack of free slots. The slot freed last is returned first. Every operation is O(1).

    >>> slots = SlotAllocator(2)
    >>> slots.allocate(), slots.allocate(), slots.allocate()
    (0, 1, None)
    >>> slots.free(1)
    >>> slots.num_free
    1
    """

    def __init__(
        self, num_slots: int, slot_bytes: int = 0, budget: ByteBudget | None = None
    ) -> None:
        super().__init__(num_slots, slot_bytes, budget)
        self._stack = list(range(num_slots - 1, -1, -1))
        self.is_taken = bytearray(num_slots)
        """1 for each allocated slot, else 0."""

    @property
    def taken(self) -> set[int]:
        """Allocated slots. O(capacity)."""
        return {slot for slot, is_taken in enumerate(self.is_taken) if is_taken}

    def allocate(self) -> int | None:
        """Return a slot, or None if none is free. O(1)."""
        if not self._stack:
            return None
        if self.budget is not None:
            if self.budget.free_bytes < self.unit_bytes:
                return None
            self.budget.free_bytes -= self.unit_bytes
        self.num_taken += 1
        slot = self._stack.pop()
        self.is_taken[slot] = 1
        return slot

    def free(self, slot: int) -> None:
        """Return ``slot``, which was allocated, to the pool. O(1).

        Raises:
            ValueError: the slot is not allocated.
        """
        if not 0 <= slot < self.capacity or not self.is_taken[slot]:
            raise ValueError(f"slot {slot} given back, which is not taken")
        if self.budget is not None:
            self.budget.free_bytes += self.unit_bytes
        self.num_taken -= 1
        self.is_taken[slot] = 0
        self._stack.append(slot)

    def free_slots(self) -> list[int]:
        """Return all unused slots, unordered. O(capacity)."""
        return list(self._stack)

    def check(self) -> None:
        """Check that every free slot is in range and listed once. O(capacity)."""
        assert len(set(self._stack)) == len(self._stack), "a slot is free twice"
        assert all(0 <= slot < self.capacity for slot in self._stack), "a free slot is out of range"
        assert len(self._stack) == self.num_unused, f"slots free: counted {self.num_unused}"
        assert sum(self.is_taken) == self.num_taken, f"{self.num_taken} slots counted as taken"
        assert self.taken.isdisjoint(self._stack), "a slot is free and taken"
