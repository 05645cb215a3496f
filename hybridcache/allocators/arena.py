"""One memory: a KV row and a state slot are two views of the same bytes.

The arena is ``capacity`` *rows* of ``row_bytes``, one token's keys and values of all layers each,
numbered from 0. A *slab* is ``slab_rows`` consecutive rows that begin at a multiple of it: enough
for one state. Slot s is slab s, so a slot lies at row ``s * slab_rows``. What is left at the end,
less than a slab, is the *tail*: it holds KV only.

Who owns what. At every moment a slab is in one of three uses:

- *free*: none of its rows is taken, and it is in ``ArenaAllocator``'s list of free slabs;
- *KV*: its rows are taken and free one page at a time, through ``ArenaAllocator.pages``;
- *state*: it is one slot, through ``ArenaAllocator.slots``.

A row or slot that is not free is *cached* or *held*, as in every pool (``hybridcache.api``),
and ``free + cached + held == total`` in rows, in slabs and in bytes.

Moving. A slot wants a whole slab. Where rows enough are free but no slab is, the KV slab with the
fewest living rows is emptied: they get the holes of others, and every *holder* is notified
(``RowHolder.rows_moved``) before ``slots.allocate`` returns. There is always such a slab: with
``slab_rows`` free rows in all, the living rows of any slab fit into the holes of the others. So the
arena takes and refuses exactly what one number of bytes would, with a state counted as
``slab_rows`` rows. States never move.

Whoever holds rows of an arena must be a holder in ``ArenaAllocator.holders`` from the first row on
until the last is given back; the cache is one, each lease is one. An emptied slab whose living rows
are not all claimed is an error at once. ``allocators.moves`` says in which order the tensors
follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

import numpy as np
import numpy.typing as npt

from hybridcache.allocators.base import BaseAllocator, ByteBudget
from hybridcache.allocators.moves import Move, RowHolder, StepQueue
from hybridcache.allocators.pages import PageAllocator
from hybridcache.allocators.slots import SlotAllocator
from hybridcache.tokens import Indices


class ArenaAllocator(BaseAllocator):
    """The arena, and its two seats: ``pages`` for KV rows and ``slots`` for states, with the verbs
    of ``PageAllocator`` and ``SlotAllocator`` and one ``ByteBudget`` between them. Counts in rows.

    ``row_bytes``, ``state_bytes``: of one token's KV and of one state; ``state_bytes`` 0: no
    states, all is tail.

    KV fills holes before it opens a free slab, and an opened slab's rows come after all other
    holes, so that it is the emptiest and few rows move when it is emptied. Rows come and go on one
    stack, as in ``PageAllocator``; to which slab they belong is asked only when a slot finds no
    free slab. Then the fullest slabs' holes come to the top.

    >>> arena = ArenaAllocator(1000, row_bytes=10, state_bytes=95)
    >>> arena.capacity, arena.slab_rows, arena.num_slabs
    (100, 10, 10)
    >>> rows, slot = arena.pages.allocate(85), arena.slots.allocate()
    >>> slot, arena.pages.num_free, arena.slots.num_free
    (9, 5, 0)
    """

    def __init__(
        self, total_bytes: int, row_bytes: int, state_bytes: int, page_size: int = 1
    ) -> None:
        """ValueError: a row without bytes, a page without rows, not a page in all."""
        if row_bytes < 1 or state_bytes < 0 or page_size < 1:
            raise ValueError(
                f"row_bytes {row_bytes}, state_bytes {state_bytes}, page_size {page_size}: "
                "a row has at least a byte, a page at least a row"
            )
        capacity = total_bytes // row_bytes
        capacity -= capacity % page_size
        if not capacity:
            raise ValueError(
                f"{total_bytes} bytes hold no page of {page_size} rows of {row_bytes} bytes"
            )
        budget = ByteBudget(capacity * row_bytes)
        super().__init__(capacity, row_bytes, budget)
        self.page_size = page_size
        self.slab_rows = (
            capacity if not state_bytes else slab_rows(state_bytes, row_bytes, page_size)
        )
        """Rows of a slab, whole pages."""
        self.num_slabs = capacity // self.slab_rows if state_bytes else 0
        """Whole slabs: how many slots there are."""
        self.pages = ArenaPages(self, budget)
        self.slots = ArenaSlots(self, budget)
        self.holders: dict[RowHolder, None] = {}
        """All that are notified of moves, in this order."""
        self.num_moves = 0
        """Slabs that were emptied so far."""
        self.num_moved_rows = 0
        self._slab_pages = self.slab_rows // page_size
        self._free_slabs = list(range(self.num_slabs - 1, -1, -1))
        self._offsets = np.arange(self._slab_pages, dtype=np.int32)
        first = self.num_slabs * self._slab_pages
        self.pages.restack(np.arange(first, capacity // page_size, dtype=np.int32))

    @property
    def num_unused(self) -> int:
        """Rows that are neither KV nor under a state. O(1)."""
        assert self.budget is not None
        return self.budget.free_bytes // self.unit_bytes

    @property
    def free_slabs(self) -> Sequence[int]:
        """Slabs that a slot can have without a search. O(1); not to be changed."""
        return self._free_slabs

    def find_slab(self) -> None:
        """Make at least one slab free: one that lost its last row unnoticed, or one that is
        emptied. To be called while ``slab_rows`` rows are free. O(slabs + holes), and for a move
        what the holders need."""
        slabs, counts = self._count_holes()
        emptiest = int(counts[:-1].argmax())
        if counts[emptiest] == self._slab_pages:
            self._collect(slabs, counts)
        else:
            self._empty(emptiest, slabs, counts)

    def collect_free_slabs(self) -> None:
        """Notice the KV slabs that have lost their last row: they are free. O(slabs + holes)."""
        self._collect(*self._count_holes())

    def occupancy(self) -> npt.NDArray[np.int64]:
        """Living KV rows of each slab; a free one has none, and so has one with a state. O(slabs +
        holes)."""
        _, counts = self._count_holes()
        living = (self._slab_pages - counts[:-1]) * self.page_size
        living[[*self._free_slabs, *self.slots.states]] = 0
        return living.astype(np.int64, copy=False)

    def _count_holes(self) -> tuple[Indices, npt.NDArray[np.intp]]:
        """(the slab of each hole, in the stack's order; holes by slab, the tail's last)."""
        slabs = self.pages.stacked() // np.int32(self._slab_pages)
        return slabs, np.bincount(slabs, minlength=self.num_slabs + 1)

    def _collect(self, slabs: Indices, counts: npt.NDArray[np.intp]) -> None:
        is_whole = counts == self._slab_pages
        is_whole[-1] = False
        self.pages.restack(self.pages.stacked()[~is_whole[slabs]])
        self._free_slabs += np.flatnonzero(is_whole)[::-1].tolist()

    def _empty(self, slab: int, slabs: Indices, counts: npt.NDArray[np.intp]) -> None:
        """Move the living rows of ``slab`` into holes elsewhere; it is free then. Holes that are
        left are stacked anew, those of the fullest slabs on top."""
        first = slab * self._slab_pages
        pages, is_inside = self.pages.stacked(), slabs == slab
        is_living = np.ones(self._slab_pages, np.bool_)
        is_living[pages[is_inside].astype(np.intp) - first] = False
        living = np.flatnonzero(is_living)
        is_outside = ~is_inside
        keys = counts.take(slabs[is_outside])
        if self._slab_pages < 1 << 16:
            keys = keys.astype(np.uint16)  # sorted in linear time
        holes = pages[is_outside].take(keys.argsort(kind="stable"))
        self.pages.restack(holes[: len(living) - 1 : -1])
        src = self.pages.rows_of(living.astype(np.int32) + np.int32(first))
        dst = self.pages.rows_of(holes[: len(living)])
        first_row = slab * self.slab_rows
        new_rows = np.arange(first_row, first_row + self.slab_rows, dtype=np.int32)
        new_rows.reshape(-1, self.page_size)[living] = dst.reshape(-1, self.page_size)
        for array in (src, dst, new_rows):
            array.setflags(write=False)
        self._free_slabs.append(slab)
        self.num_moves += 1
        self.num_moved_rows += len(src)
        move = Move(slab, src, dst, new_rows)
        claimed = sum([holder.rows_moved(move) for holder in self.holders])
        if claimed != len(src):
            raise RuntimeError(
                f"{len(src)} rows of slab {slab} moved, but holders claim {claimed}: "
                "whoever holds rows must be in holders"
            )

    def fill(self, num_pages: int) -> None:
        """Bring ``num_pages`` more free pages on the stack, which are in free slabs. O(those)."""
        num_slabs = -(-num_pages // self._slab_pages)
        opened = self._free_slabs[-num_slabs:]
        del self._free_slabs[-num_slabs:]
        self._open(opened[::-1])

    def open_slabs(self, slabs: Sequence[int]) -> None:
        """Turn those of ``slabs`` that are free into KV slabs without living rows. O(slabs +
        rows)."""
        opened = set(slabs).intersection(self._free_slabs)
        self._free_slabs[:] = [slab for slab in self._free_slabs if slab not in opened]
        self._open(list(opened))

    def _open(self, slabs: list[int]) -> None:
        """``slabs``, in the list no more, become holes: the last one's are used first, and all of
        them after the holes that there are."""
        size = self._slab_pages
        bottom = self.pages.lift(len(slabs) * size)
        for rank, slab in enumerate(slabs):
            np.add(self._offsets, slab * size, out=bottom[rank * size : (rank + 1) * size])

    def free_pages(self) -> Indices:
        """All pages that are neither KV nor under a state, in no order. O(pages)."""
        first = np.array(self._free_slabs, np.int32)[:, None] * np.int32(self._slab_pages)
        whole = (first + self._offsets).reshape(-1)
        return np.concatenate([self.pages.stacked(), whole])

    def check(self) -> None:
        """AssertionError unless every row is free once, or taken; in rows, slabs and bytes.
        O(pages)."""
        assert self.budget is not None
        free = self.free_pages()
        num_pages = self.capacity // self.page_size
        assert len(np.unique(free)) == len(free), "a KV page is free twice"
        assert not len(free) or (free.min() >= 0 and free.max() < num_pages), (
            "a free KV page is out of range"
        )
        num_free = len(free) * self.page_size
        assert num_free == self.num_unused, f"{num_free} rows free, counted {self.num_unused}"
        assert self.budget.free_bytes == num_free * self.unit_bytes, "bytes free are not rows free"
        states = self.slots.states
        assert states.isdisjoint(self._free_slabs), "a slab is free and a state"
        assert len(set(self._free_slabs)) == len(self._free_slabs), "a slab is free twice"
        assert states.isdisjoint((free // self._slab_pages).tolist()), "a row under a state is free"
        used = num_free + self.pages.num_taken + len(states) * self.slab_rows
        assert used == self.capacity, (
            f"{used} rows are free, KV or under states, not {self.capacity}"
        )
        assert self.pages.num_taken >= 0, "more rows are under states than there are"

    def check_taken(self, rows: Indices) -> None:
        """AssertionError if one of ``rows``, KV in somebody's hands, lies under a state.
        O(rows)."""
        states = self.slots.states
        assert states.isdisjoint(np.unique(rows // self.slab_rows).tolist()), (
            "a taken KV row lies under a state"
        )


def slab_rows(state_bytes: int, row_bytes: int, page_size: int = 1) -> int:
    """Rows that one state takes, whole pages.

    >>> slab_rows(state_bytes=95, row_bytes=10), slab_rows(95, 10, page_size=4)
    (10, 12)
    """
    rows = -(-state_bytes // row_bytes)
    return -(-rows // page_size) * page_size


def step_queue_of(pages: PageAllocator) -> StepQueue:
    """Return an empty step queue; if ``pages`` are an arena's, it is notified of every move."""
    arena = arena_of(pages)
    if arena is None or not arena.num_slabs:
        return StepQueue()
    queue = StepQueue(arena.num_slabs, arena.slab_rows)
    arena.holders[queue] = None
    return queue


def arena_of(pages: PageAllocator) -> ArenaAllocator | None:
    """Return the arena that ``pages`` belong to, in which rows can move; None for a fixed pool."""
    return pages.arena if isinstance(pages, ArenaPages) else None


class ArenaPages(PageAllocator):
    """The arena's KV rows. ``capacity`` is all of the arena; what states take of it is neither
    unused nor free."""

    def __init__(self, arena: ArenaAllocator, budget: ByteBudget) -> None:
        super().__init__(arena.capacity, arena.page_size, arena.unit_bytes, budget)
        self.arena: ArenaAllocator = arena
        self._height = 0

    @property
    def num_unused(self) -> int:
        """Rows that are not KV, whether free or under a state. O(1)."""
        return self.num_free + len(self.arena.slots.states) * self.arena.slab_rows

    @property
    def num_free(self) -> int:
        """Rows that ``allocate`` can hand out now, whole pages. O(1)."""
        assert self.budget is not None
        return self.budget.free_bytes // self.unit_bytes

    def allocate(self, num_tokens: int) -> Indices | None:
        """As ``PageAllocator.allocate``. O(n), and O(slabs) where holes were sorted since the last
        time."""
        missing = -(-num_tokens // self.page_size) - self._height
        if missing > 0 and num_tokens <= self.num_free:
            self.arena.fill(missing)
        return super().allocate(num_tokens)

    def reserve(self, rows: Indices) -> None:
        """Take exactly ``rows``, whole pages. O(capacity). ValueError: some are not free."""
        if len(rows) > self.num_free or len(rows) % self.page_size:
            raise ValueError(f"{len(rows)} rows asked for, {self.num_free} are free")
        self.arena.open_slabs(np.unique(rows // self.arena.slab_rows).tolist())
        super().reserve(rows)

    def free_rows(self) -> Indices:
        """All rows that are neither KV nor under a state, in no order. O(capacity)."""
        return self.rows_of(self.arena.free_pages())

    def rows_of(self, pages: Indices) -> Indices:
        """The rows of ``pages``: int32[n * page_size]."""
        if self.page_size == 1:
            return pages
        return (pages[:, None] * self.page_size + self._offsets).reshape(-1)

    def lift(self, num_pages: int) -> Indices:
        """Room for ``num_pages`` under the stack, handed out last, which the caller fills."""
        height = self._height
        self._height = top = height + num_pages
        self._stack[num_pages:top] = self._stack[:height]
        return self._stack[:num_pages]

    def restack(self, pages: Indices) -> None:
        """Let the stack be ``pages``."""
        self._height = len(pages)
        self._stack[: self._height] = pages

    def stacked(self) -> Indices:
        """What is on the stack; not to be changed."""
        return self._stack[: self._height]

    def check(self) -> None:
        """See ``ArenaAllocator.check``."""
        self.arena.check()


class ArenaSlots(SlotAllocator):
    """The arena's slots: slot s is slab s."""

    def __init__(self, arena: ArenaAllocator, budget: ByteBudget) -> None:
        super().__init__(0, arena.slab_rows * arena.unit_bytes, budget)
        self.capacity = arena.num_slabs
        self.states: set[int] = set()
        """Slots that are taken."""
        self._arena = arena

    @property
    def num_unused(self) -> int:
        """Slots that are not taken, whether free or KV. O(1)."""
        return self.capacity - len(self.states)

    def allocate(self) -> int | None:
        """One slot, or None where fewer rows are free than one takes. O(1), or as
        ``ArenaAllocator.find_slab``."""
        assert self.budget is not None
        if self.budget.free_bytes < self.unit_bytes or not self.capacity:
            return None
        arena = self._arena
        if not arena.free_slabs:
            arena.find_slab()
        slot = arena._free_slabs.pop()
        self.states.add(slot)
        self.budget.take(self.unit_bytes)
        return slot

    def free(self, slot: int) -> None:
        """Take back ``slot``, which is taken. O(1). ValueError: it is not; TypeError: no whole
        number."""
        if index(slot) not in self.states:
            raise ValueError(f"slot {slot} given back, which is not taken")
        assert self.budget is not None
        self.states.remove(slot)
        self.budget.give_back(self.unit_bytes)
        self._arena._free_slabs.append(slot)

    def reserve(self, slots: Sequence[int]) -> None:
        """Take exactly ``slots``. O(capacity). ValueError: some are taken, or KV lies in them."""
        taken = set(slots)
        self._arena.collect_free_slabs()
        free = self._arena._free_slabs
        if len(taken) < len(slots) or not taken <= set(free):
            raise ValueError(f"{len(slots)} slots asked for that are not free")
        assert self.budget is not None
        free[:] = [slab for slab in free if slab not in taken]
        self.states |= taken
        self.budget.take(len(slots) * self.unit_bytes)

    def free_slots(self) -> list[int]:
        """Slabs that are free, in no order, those not noticed yet left out. O(slabs)."""
        return list(self._arena.free_slabs)

    def check(self) -> None:
        assert all(0 <= slot < self.capacity for slot in self.states), "a state is out of range"
