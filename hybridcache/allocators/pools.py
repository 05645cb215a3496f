"""Allocators of KV rows in whole pages and of state slots, and the byte budget they can share.

An arena is shared memory of KV rows and state slots, which are two views of the same bytes.

The arena is ``capacity`` *rows* of ``row_bytes``: keys and values of one token in all layers. Rows
are numbered from 0. A *slab* is ``slab_rows`` consecutive rows that begin at a multiple of
``slab_rows``: enough for one state. Slot s is slab s, so it begins at row ``s * slab_rows``. The
remainder at the end, less than a slab, is the *tail*. It holds KV only.

Ownership. At any moment a slab has one of three uses:

- *free*: no row of it is allocated, and it is in the list of free slabs of ``ArenaAllocator``;
- *KV*: its rows are allocated and freed in pages, by the ``ArenaAllocator`` itself;
- *state*: it is one slot, through ``ArenaAllocator.slots``.

Moves. A slot needs a whole slab. If enough rows are free but no slab is, the KV slab with the
fewest living rows is emptied. Its rows move to holes in other slabs, and every *holder* is notified
(``RowHolder.rows_moved``) before ``slots.allocate`` returns. Such a slab always exists: with
``slab_rows`` free rows in total, the living rows of any slab fit into the holes of the others. So
the arena accepts and refuses exactly the same requests as a byte budget in which a state counts as
``slab_rows`` rows. States never move.

An owner of rows must be in ``ArenaAllocator.holders`` from its first row until its last row is
freed: the cache, and each lease. ``allocators.moves`` defines the order in which the tensors
follow.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hybridcache.allocators.moves import Indices, Move, RowHolder

MAX_ROWS = 1 << 31
"""Number of rows or slots that int32 can number."""


class ByteBudget:
    """Counter of free bytes, which the allocators that share it change."""

    def __init__(self, total_bytes: int) -> None:
        """Raise ValueError if ``total_bytes`` is not positive."""
        if total_bytes < 1:
            raise ValueError(f"total_bytes must be at least 1 (got {total_bytes}).")
        self.total_bytes = self.free_bytes = total_bytes


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


BLOCK = 1 << 12
"""Minimum number of pages that are written to the stack together."""


def are_distinct(rows: Indices) -> bool:
    """Return True if no number occurs twice. O(len(rows) + max(rows)), for numbers from 0."""
    return len(rows) == 0 or bool(np.bincount(rows).max() == 1)


class PageAllocator(BaseAllocator):
    """Stack of free pages. A page is ``page_size`` consecutive KV rows.

    Capacity and counts are in rows (tokens). The stack is one int32 array with its height, so that
    taking or freeing many pages is one copy. Below it, the first ``_num_implied`` pages are free
    and not written, because a disk tier has many rows and is mostly empty. So host memory depends
    on the highest stack, not on the number of rows.

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
        self._height, self._num_implied = 0, num_pages
        self._offsets = np.arange(page_size, dtype=np.int32)

    def allocate(self, num_tokens: int) -> Indices | None:
        """Return rows for ``num_tokens`` tokens, rounded up to whole pages: int32[n]. O(n).

        Returns None if that many are not free. Raises ValueError for a negative number.
        """
        num_pages, budget = -(-num_tokens // self.page_size), self.budget
        top, num_rows = self._height, num_pages * self.page_size
        bottom, num_bytes = top - num_pages, num_rows * self.unit_bytes
        if -bottom > self._num_implied or (budget is not None and num_bytes > budget.free_bytes):
            return None
        if num_tokens < 0:
            raise ValueError(f"num_tokens must not be negative (got {num_tokens}).")
        if bottom < 0:
            implied = self._num_implied
            first = max(0, implied - max(-bottom, BLOCK))
            pages = np.concatenate((np.arange(first, implied, dtype=np.int32), self._stack[:top]))
            self._stack[: len(pages)] = pages
            bottom, top, self._num_implied = bottom + implied - first, len(pages), first
        pages = self._stack[bottom:top]
        if budget is not None:
            budget.free_bytes -= num_bytes
        self.num_taken += num_rows
        self._height = bottom
        return pages.copy() if self.page_size == 1 else self.rows_of(pages)

    def rows_of(self, pages: Indices) -> Indices:
        """Return the rows of ``pages``: int32[n * page_size]."""
        if self.page_size == 1:
            return pages
        return (pages[:, None] * self.page_size + self._offsets).reshape(-1)

    def _free_pages(self) -> Indices:
        """Return all free pages, unordered. O(capacity)."""
        implied = np.arange(self._num_implied, dtype=np.int32)
        return np.concatenate([implied, self._stack[: self._height]])

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
        budget = self.budget
        if not self._stack or (budget is not None and budget.free_bytes < self.unit_bytes):
            return None
        if budget is not None:
            budget.free_bytes -= self.unit_bytes
        self.num_taken += 1
        slot = self._stack.pop()
        self.is_taken[slot] = 1
        return slot

    def free(self, slot: int) -> None:
        """Return ``slot`` to the pool. Raises ValueError if it is not allocated. O(1)."""
        budget = self.budget
        if not 0 <= slot < self.capacity or not self.is_taken[slot]:
            raise ValueError(f"slot {slot} given back, which is not taken")
        if budget is not None:
            budget.free_bytes += self.unit_bytes
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


class ArenaAllocator(PageAllocator):
    """Allocator of the arena's KV rows, with one of its states (``slots``).

    ``row_bytes`` and ``state_bytes`` are the sizes of one token's KV and of one state. With
    ``state_bytes=0`` there are no states, and everything is tail. ``capacity`` is the whole arena:
    rows of states count as unused, and are not free.

    KV fills holes before it opens a free slab. The rows of an opened slab are used after all other
    holes, so that it is the emptiest and few rows move when it is emptied. Free rows are on one
    stack, as in ``PageAllocator``; their slabs are determined only if a slot finds no free slab.
    Then the holes of the fullest slabs are put on top.

    >>> arena = ArenaAllocator(1000, row_bytes=10, state_bytes=95)
    >>> arena.capacity, arena.slab_rows, arena.num_slabs
    (100, 10, 10)
    >>> rows, slot = arena.allocate(85), arena.slots.allocate()
    >>> slot, arena.num_free, arena.slots.num_free
    (9, 5, 0)
    """

    budget: ByteBudget

    def __init__(
        self, total_bytes: int, row_bytes: int, state_bytes: int, page_size: int = 1
    ) -> None:
        """Raise ValueError if ``total_bytes`` are less than one page."""
        capacity = total_bytes // row_bytes
        capacity -= capacity % page_size
        if not capacity:
            raise ValueError(
                f"total_bytes must hold at least one page: {page_size} rows of {row_bytes} bytes "
                f"(got {total_bytes})."
            )
        super().__init__(capacity, page_size, row_bytes, ByteBudget(capacity * row_bytes))
        self.slab_rows = (
            capacity if not state_bytes else slab_rows(state_bytes, row_bytes, page_size)
        )
        """Rows of a slab, in whole pages."""
        self.num_slabs = capacity // self.slab_rows if state_bytes else 0
        """Number of whole slabs, which is the number of slots."""
        self.free_slabs = list(range(self.num_slabs - 1, -1, -1))
        """Slabs that a slot can get without a search, the next one last."""
        self.slots = ArenaSlots(self)
        self.holders: dict[RowHolder, None] = {}
        """Holders that are notified of moves, in this order."""
        self.num_moves = 0
        """Number of slabs emptied so far."""
        self.num_moved_rows = 0
        self._slab_pages = self.slab_rows // page_size
        self._slab_offsets = np.arange(self._slab_pages, dtype=np.int32)
        first, self._num_implied = self.num_slabs * self._slab_pages, 0
        self._restack(np.arange(first, capacity // page_size, dtype=np.int32))

    def allocate(self, num_tokens: int) -> Indices | None:
        """Return rows as ``PageAllocator.allocate``.

        O(n), plus O(slabs) after a sort of the holes.
        """
        missing = -(-num_tokens // self.page_size) - self._height
        if missing > 0 and num_tokens <= self.num_free:
            self._fill(missing)
        return super().allocate(num_tokens)

    def find_slab(self) -> None:
        """Make at least one slab free: one without living rows, or the emptiest one after a move.

        At least ``slab_rows`` rows must be free. O(slabs + holes), plus the work of the holders for
        a move.
        """
        slabs, counts = self._count_holes()
        emptiest = int(counts[:-1].argmax())
        if counts[emptiest] < self._slab_pages:
            self._empty(emptiest, slabs, counts)
            return
        is_whole = counts == self._slab_pages
        is_whole[-1] = False  # the tail is no slab
        self._restack(self._stacked()[~is_whole[slabs]])
        self.free_slabs += np.flatnonzero(is_whole)[::-1].tolist()

    def occupancy(self) -> npt.NDArray[np.int64]:
        """Return the number of living KV rows of each slab, 0 for free slabs and states. O(slabs +
        holes)."""
        _, counts = self._count_holes()
        living = (self._slab_pages - counts[:-1]) * self.page_size
        living[[*self.free_slabs, *self.slots.taken]] = 0
        return living.astype(np.int64, copy=False)

    def _count_holes(self) -> tuple[Indices, npt.NDArray[np.intp]]:
        """Return the slab of each hole in the order of the stack, and the holes per slab, the tail
        last."""
        slabs = self._stacked() // np.int32(self._slab_pages)
        return slabs, np.bincount(slabs, minlength=self.num_slabs + 1)

    def _empty(self, slab: int, slabs: Indices, counts: npt.NDArray[np.intp]) -> None:
        """Move the living rows of ``slab`` to holes elsewhere, and list it as free.

        The remaining holes are stacked again, with those of the fullest slabs on top.
        """
        first, num_inside = slab * self._slab_pages, int(counts[slab])
        counts[slab] = self._slab_pages  # more than in any other slab: its holes come last
        # Keys of 16 bits are sorted in linear time.
        keys = counts.astype(np.uint16 if self._slab_pages < 1 << 16 else np.intp).take(slabs)
        pages = self._stacked().take(keys.argsort(kind="stable"))
        holes = pages[:-num_inside]
        is_living = np.ones(self._slab_pages, np.bool_)
        is_living[pages[-num_inside:] - first] = False
        living = np.flatnonzero(is_living)
        self._restack(holes[: len(living) - 1 : -1])
        src = self.rows_of(living.astype(np.int32) + np.int32(first))
        dst = self.rows_of(holes[: len(living)])
        first_row = slab * self.slab_rows
        new_rows = np.arange(first_row, first_row + self.slab_rows, dtype=np.int32)
        new_rows.reshape(-1, self.page_size)[living] = dst.reshape(-1, self.page_size)
        for array in (src, dst, new_rows):
            array.setflags(write=False)
        self.free_slabs.append(slab)
        self.num_moves += 1
        self.num_moved_rows += len(src)
        move = Move(slab, src, dst, new_rows)
        claimed = sum([holder.rows_moved(move) for holder in self.holders])
        if claimed != len(src):
            raise RuntimeError(
                f"{len(src)} rows of slab {slab} moved, but holders claim {claimed}: "
                "add every owner of rows to ArenaAllocator.holders"
            )

    def _fill(self, num_pages: int) -> None:
        """Put ``num_pages`` free pages of free slabs on the stack, below all others.
        O(num_pages)."""
        num_slabs = -(-num_pages // self._slab_pages)
        opened = self.free_slabs[-num_slabs:]
        del self.free_slabs[-num_slabs:]
        pages = np.concatenate((self._pages_of(opened[::-1]), self._stack[: self._height]))
        self._height = len(pages)
        self._stack[: self._height] = pages

    def _restack(self, pages: Indices) -> None:
        """Replace the stack by ``pages``."""
        self._height = len(pages)
        self._stack[: self._height] = pages

    def _stacked(self) -> Indices:
        """Return the pages on the stack, a view."""
        return self._stack[: self._height]

    def _free_pages(self) -> Indices:
        """Return all pages that are neither KV nor part of a state, unordered. O(pages)."""
        return np.concatenate([self._stacked(), self._pages_of(self.free_slabs)])

    def _pages_of(self, slabs: list[int]) -> Indices:
        """Return all pages of ``slabs``, in their order."""
        first = np.array(slabs, np.int32)[:, None] * np.int32(self._slab_pages)
        return (first + self._slab_offsets).reshape(-1)

    def check(self, num_reserved: int = 0) -> None:
        """Check that every row is free once, or allocated; in rows, slabs and bytes. O(pages)."""
        free, states = self._free_pages(), self.slots.taken
        super().check(num_reserved + len(states) * self.slab_rows)
        free_bytes = len(free) * self.page_size * self.unit_bytes
        assert self.budget.free_bytes == free_bytes, "bytes free are not rows free"
        assert states.isdisjoint(self.free_slabs), "a slab is free and a state"
        assert len(set(self.free_slabs)) == len(self.free_slabs), "a slab is free twice"
        assert states.isdisjoint((free // self._slab_pages).tolist()), "a row under a state is free"

    def check_taken(self, rows: Indices) -> None:
        """Check that none of ``rows``, which are allocated KV rows, is part of a state. O(rows)."""
        slabs = np.unique(rows // self.slab_rows).tolist()
        assert self.slots.taken.isdisjoint(slabs), "a taken KV row lies under a state"


def slab_rows(state_bytes: int, row_bytes: int, page_size: int = 1) -> int:
    """Return the number of rows that one state takes, in whole pages.

    >>> slab_rows(state_bytes=95, row_bytes=10), slab_rows(95, 10, page_size=4)
    (10, 12)
    """
    rows = -(-state_bytes // row_bytes)
    return -(-rows // page_size) * page_size


class ArenaSlots(SlotAllocator):
    """Slots of the arena: slot s is slab s. Its stack is the list of free slabs."""

    budget: ByteBudget

    def __init__(self, arena: ArenaAllocator) -> None:
        super().__init__(arena.num_slabs, arena.slab_rows * arena.unit_bytes, arena.budget)
        self._stack = arena.free_slabs
        self._arena = arena

    def allocate(self) -> int | None:
        """Return a slot, or None if fewer rows are free than it takes.

        O(1), or as ``ArenaAllocator.find_slab``.
        """
        if self.capacity and not self._stack and self.budget.free_bytes >= self.unit_bytes:
            self._arena.find_slab()
        return super().allocate()

    def check(self) -> None:
        assert sum(self.is_taken) == self.num_taken, f"{self.num_taken} states counted"
