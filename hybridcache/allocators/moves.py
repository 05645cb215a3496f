"""Work on the tensors that follows from the cache's decisions, in order of execution.

The cache changes its index numbers at once. When it empties an arena slab, offloads an entry or
loads one, the new numbers are valid before the method returns, and freed rows may be allocated
again. The bytes follow later: the owner of the tensors takes one ``StepPlan`` before each step
(``HybridRadixCache.take_step``) and carries it out:

1. ``transfers``, one after another: moves of rows within the arena (``memory[dst] = memory[src]``),
   copies between tiers, and notes of dropped disk rows. A transfer may read rows that an earlier
   one wrote, or overwrite rows that an earlier one read, so moves and tier copies share one list.
   Within one move no row is both source and target.
2. ``row_writes``: parts of the request table that are new or out of date.
3. ``restores``: state copies of requests that resume from a checkpoint.

Then the step computes, and writes the KV rows and checkpoint slots that it was given.

``StepPlan.carry_out`` does this with the owner's methods, in this order, once. An owner that works
through the plan by itself calls ``StepPlan.done`` afterwards. A plan that was not taken, or not
carried out, is noticed: the next ``take_step`` raises RuntimeError, as do ``publish``, ``finish``
and ``preempt`` of a lease that depends on it.

The fixed order is safe. A slot is allocated after its slab was emptied, so all writes to slots (3
and the step) must follow the transfers (1). A move that comes later in the same plan writes and
reads only rows of KV slabs. It could disturb a restore only through a slot that was freed in
between. The source of a restore is a checkpoint under the request's lock, and its target is the
request's own slot. If the request ends before the step, its restore is dropped from the plan. So no
slot of a pending restore is ever used for KV.

A step in flight may still read and write old rows: the bytes that must move are those present when
it ends. On a device with streams, the transfers are therefore ordered after the step in flight and
before the next one, and the host does not wait. A plan that was taken must be carried out even if
its step computes nothing, because its numbers are already valid.

Work may overlap where no row is shared. A request that resumes from a copy still under way waits
for it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from threading import get_ident
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from hybridcache.tokens import Indices, Tokens


class Move(NamedTuple):
    """Living rows of one slab and their new places."""

    slab: int
    """Number of the emptied slab."""
    src: Indices
    """Rows of ``slab`` that were taken, ascending: int32[n], n <= ``slab_rows``, whole pages."""
    dst: Indices
    """New row of each, in other slabs: int32[n]."""
    new_rows: Indices
    """New row per offset in the slab, or the old row if nothing lived there. int32[``slab_rows``].
    """

    def rename(self, rows: Indices) -> npt.NDArray[np.intp]:
        """Replace old rows by new ones in ``rows``, int32[k], in place. O(k).

        Returns the positions that changed, ascending.
        """
        size = len(self.new_rows)
        offsets = rows - np.int32(self.slab * size)
        positions = (offsets.view(np.uint32) < size).nonzero()[0]
        if len(positions):
            rows[positions] = self.new_rows.take(offsets.take(positions))
        return positions


class RowHolder(Protocol):
    """Object that keeps row numbers of an arena. Hashable by identity."""

    def rows_moved(self, move: Move) -> int:
        """Rename the kept rows of ``move.src`` and return how many of them are owned here.

        Must not call the arena.
        """
        ...


DEVICE, HOST, DISK = "device", "host", "disk"
"""Names of the tiers, the nearest first."""


class Copy(NamedTuple):
    """Copy of bytes between tiers."""

    kind: Literal["kv", "checkpoint"]
    """Rows of KV, or one state."""
    src_tier: str
    """Tier to read: ``device``, ``host`` or ``disk``."""
    src: Indices
    """Rows in ``src_tier``: int32[n]. For a checkpoint on the device, its slot: int32[1]."""
    dst_tier: str
    """Tier to write."""
    dst: Indices
    """Rows in ``dst_tier``. KV has as many as ``src``; a state fills its rows in this order."""
    position: int
    """Number of tokens from the root to the end of the copied part. KV is that of the ``len(src)``
    tokens before it."""
    path: tuple[Hashable, Tokens] | None = None
    """(namespace, tokens[:position]) for copies to disk, else None."""


class Drop(NamedTuple):
    """Rows on disk with contents that are no longer in the tree."""

    tier: str
    """Tier of the rows: ``disk``."""
    rows: Indices
    """The rows: int32[n]. They can be reused; nothing has to be done."""


Transfer = Move | Copy | Drop


class RowWrite(NamedTuple):
    """A part of one request's row in the request table that is new or out of date."""

    table_row: int
    """``LeaseRequest.table_row`` of the request."""
    start: int
    """Position of the first index."""
    kv_indices: Indices
    """KV row of each position from ``start`` on: int32[n], a copy."""

    def up_to(self, end: int) -> RowWrite:
        """Return the part of this write below position ``end``."""
        return self._replace(kv_indices=self.kv_indices[: max(end - self.start, 0)])


class StepMemory(Protocol):
    """Owner of the tensors, for ``StepPlan.carry_out``.

    Two pools need ``restore``. An arena adds ``move``, tiers add ``copy``, and requests with a
    ``table_row`` add ``write_row``. A method that no plan needs can be missing. A class may derive
    from this one, for type checkers: methods that it does not define count as missing.
    """

    def move(self, move: Move) -> None:
        """Copy rows ``move.src`` of the arena to ``move.dst``."""
        ...

    def copy(self, copy: Copy) -> None:
        """Copy ``copy.src`` of ``copy.src_tier`` to ``copy.dst`` of ``copy.dst_tier``, rows or one
        state (``copy.kind``)."""
        ...

    def write_row(self, write: RowWrite) -> None:
        """Write ``write.kv_indices`` into row ``write.table_row``, from ``write.start`` on."""
        ...

    def restore(self, checkpoint: int, own: int) -> None:
        """Copy the state in slot ``checkpoint`` to slot ``own``, which is ``own_slot`` if the
        request has one."""
        ...


@dataclass(slots=True)  # not frozen: that costs a microsecond per plan
class StepPlan:
    """All work on the tensors that is due before the next step, in this order.

    Carry it out with ``carry_out``. Or do its work yourself and then call ``done``; a caller
    without tensors calls ``done`` alone. A plan that was taken must be carried out, even if its
    step computes nothing. The restore of a request that ends before the plan is taken is not in it.
    ``examples/04_minimal_engine.py`` carries plans out with numpy arrays;
    ``hybridcache/allocators/moves.py`` states why the order is safe.

    >>> import numpy as np
    >>> from hybridcache import CacheConfig, build_prefix_cache
    >>> class Rows:
    ...     def __init__(self, num_rows):
    ...         self.memory = np.zeros(num_rows)
    ...     def move(self, move):
    ...         self.memory[move.dst] = self.memory[move.src]
    >>> cache = build_prefix_cache(CacheConfig(num_kv_tokens=100, num_slots=2))
    >>> cache.take_step().carry_out(Rows(100))  # nothing is due yet
    """

    transfers: tuple[Transfer, ...] = ()
    """Moves, copies between tiers and drops, each complete before the next begins."""
    row_writes: tuple[RowWrite, ...] = ()
    """At most one per running request that has a ``table_row``."""
    restores: tuple[tuple[int, int], ...] = ()
    """(checkpoint slot, own slot) of each request that resumes. The first is a slot of the cache.
    So is the second, unless the request has an ``own_slot``: that one is in the caller's memory."""
    _queue: StepQueue | None = field(default=None, init=False, repr=False, compare=False)
    _number: int = field(default=0, init=False, repr=False, compare=False)

    def __bool__(self) -> bool:
        """Return True if any work is due."""
        return bool(self.transfers or self.row_writes or self.restores)

    def carry_out(self, memory: StepMemory) -> None:
        """Call the method of ``memory`` for each piece of work, in order, and note that it is done.

        Drops are skipped. O(work).

        Raises:
            TypeError: ``memory`` lacks a method that this plan needs. Nothing is done.
            RuntimeError: the plan was carried out before.
        """
        if self._queue is not None and self._queue.num_done >= self._number:
            raise RuntimeError(DONE_TWICE)
        for name, is_needed in (
            ("move", any(isinstance(one, Move) for one in self.transfers)),
            ("copy", any(isinstance(one, Copy) for one in self.transfers)),
            ("write_row", self.row_writes),
            ("restore", self.restores),
        ):
            method = getattr(memory, name, None)
            is_own = getattr(method, "__func__", method) is not getattr(StepMemory, name)
            if is_needed and not (is_own and callable(method)):
                raise TypeError(
                    f"this step plan needs a method {name!r}, which {type(memory).__name__} does "
                    "not have: see hybridcache.StepMemory"
                )
        for transfer in self.transfers:
            if isinstance(transfer, Move):
                memory.move(transfer)
            elif isinstance(transfer, Copy):
                memory.copy(transfer)
        for write in self.row_writes:
            memory.write_row(write)
        for checkpoint, own in self.restores:
            memory.restore(checkpoint, own)
        self.done()

    def done(self) -> None:
        """Note that all of the work is done, or queued before the step on the same device. O(1).

        Raises:
            RuntimeError: the plan was carried out before.
        """
        queue = self._queue
        if queue is not None:
            if queue.num_done >= self._number:
                raise RuntimeError(DONE_TWICE)
            queue.num_done = self._number


DONE_TWICE = (
    "this step plan was carried out before: doing its moves again destroys rows. Take one plan per "
    "step with cache.take_step()"
)
NOT_DONE = (
    "the last step plan was taken but not carried out, so rows and states are not what the cache "
    "counts on: call plan.carry_out(memory), or plan.done() after doing its work yourself. If it "
    "failed half-way, abort all leases and call cache.reset()"
)
NOT_TAKEN = (
    "tokens up to {} were computed before the step plan of their rows and slots was carried out, "
    "so they may be wrong: abort this lease. Call cache.take_step().carry_out(memory) after begin, "
    "extend and take_checkpoint_slots, and before computing, or .done() if there are no tensors"
)


class RunningLease(Protocol):
    """Row numbers of one running request. Hashable, by identity."""

    def rows_moved(self, move: Move) -> int:
        """Rename the kept rows of ``move.src``; return how many of them the lease holds."""
        ...

    def rows_from(self, start: int) -> Indices:
        """Return the known KV rows of positions from ``start`` on: int32[k]."""
        ...

    def row_write(self) -> RowWrite | None:
        """Return the positions that changed since ``row_write_taken``, or None if there are
        none."""
        ...

    def row_write_taken(self) -> None:
        """Note that a plan contains ``row_write()``."""
        ...


class StepQueue:
    """The next ``StepPlan`` of one cache while it grows. A row holder for all running leases.

    For an arena it keeps a table of the slabs in which each lease has rows. A move then renames
    rows of the leases that have some in the emptied slab, and no other lease is looked at.
    """

    __slots__ = (
        "_changed",
        "_free_numbers",
        "_is_in_slab",
        "_leases",
        "_numbers",
        "_restores",
        "_slab_rows",
        "_thread",
        "_transfers",
        "_unindexed",
        "num_done",
        "num_moves",
        "num_open",
        "num_taken",
    )

    def __init__(self, num_slabs: int = 0, slab_rows: int = 1) -> None:
        """``num_slabs`` is 0 if rows never move."""
        self.num_open = 0
        """Running leases."""
        self._thread = 0
        self.num_moves = 0
        """Slabs emptied since the last ``take``. A scheduler that allows at most one per step stops
        adding requests to the step when it is 1."""
        self.num_taken = self.num_done = 0
        """Number of plans taken, and carried out. Empty plans count as carried out."""
        self._transfers: list[Transfer] = []
        self._restores: dict[RunningLease, tuple[int, int]] = {}
        self._changed: dict[RunningLease, None] = {}
        self._numbers: dict[RunningLease, int] = {}
        self._slab_rows = slab_rows
        # The last column is the tail of the arena, from which no row ever moves.
        self._is_in_slab = np.zeros((8 if num_slabs else 0, num_slabs + 1), np.bool_)
        self._leases: list[RunningLease | None] = [None] * len(self._is_in_slab)
        self._free_numbers = list(range(len(self._is_in_slab)))
        # First position of each lease that is not in the table yet. Rows are added to the table
        # when a slab moves: many leases end before one does.
        self._unindexed: dict[RunningLease, int] = {}

    @property
    def num_transfers(self) -> int:
        """Transfers that no plan contains yet. O(1)."""
        return len(self._transfers)

    @property
    def num_leases(self) -> int:
        """Leases that are notified of moves; 0 if rows never move. O(1)."""
        return len(self._numbers)

    def refuse_other_thread(self) -> None:
        """Raise RuntimeError if leases of another thread are running. O(1)."""
        thread = get_ident()
        if not self.num_open:
            self._thread = thread
        elif thread != self._thread:
            raise RuntimeError(
                "another thread has running leases of this cache, which is for one thread at a "
                "time: use it from that thread, or end its leases first."
            )

    def open(self, lease: RunningLease) -> None:
        """Notify ``lease`` of moves until ``close``. O(1) amortised."""
        self.num_open += 1
        if not len(self._is_in_slab):
            return
        if not self._free_numbers:
            count = len(self._leases)
            self._is_in_slab = np.concatenate((self._is_in_slab, np.zeros_like(self._is_in_slab)))
            self._leases += [None] * count
            self._free_numbers = list(range(count, 2 * count))
        number = self._free_numbers.pop()
        self._numbers[lease], self._leases[number] = number, lease

    def close(self, lease: RunningLease) -> None:
        """Forget ``lease``, its restore and its row write. O(slabs)."""
        self.num_open -= 1
        self._restores.pop(lease, None)
        self._changed.pop(lease, None)
        number = self._numbers.pop(lease, None)
        if number is not None:
            self._unindexed.pop(lease, None)
            self._is_in_slab[number] = False
            self._leases[number] = None
            self._free_numbers.append(number)

    def rows_added(self, lease: RunningLease, start: int) -> None:
        """Note that ``lease`` has other rows from position ``start`` on. O(1)."""
        if lease in self._numbers and start < self._unindexed.get(lease, start + 1):
            self._unindexed[lease] = start

    def row_write_due(self, lease: RunningLease) -> None:
        """Include ``lease.row_write()`` in the next plan. O(1)."""
        self._changed[lease] = None

    def restore(self, lease: RunningLease, src: int, dst: int) -> None:
        """Include the copy of the state in slot ``src`` to ``dst`` in the next plan. O(1)."""
        self._restores[lease] = src, dst

    def add(self, transfer: Transfer) -> None:
        """Include ``transfer`` in the next plan. O(1)."""
        self._transfers.append(transfer)
        self.num_moves += isinstance(transfer, Move)

    def rows_moved(self, move: Move) -> int:
        """Rename the rows of all leases (``RowHolder``); return how many of them the leases hold.

        O(leases / 8 + rows of the leases that have some in the slab + rows added since the last
        move).
        """
        self.add(move)
        if not self._numbers:
            return 0
        self._index()
        table, num_held = self._is_in_slab, 0
        numbers = table[:, move.slab].nonzero()[0]
        if not len(numbers):
            return 0
        for number in numbers.tolist():
            lease = self._leases[number]
            assert lease is not None
            num_held += lease.rows_moved(move)
        table[numbers, move.slab] = False
        table[numbers[:, None], np.unique(move.dst // self._slab_rows)] = True
        return num_held

    def _index(self) -> None:
        for lease, start in self._unindexed.items():
            self._is_in_slab[self._numbers[lease], lease.rows_from(start) // self._slab_rows] = True
        self._unindexed.clear()

    def take(self) -> StepPlan:
        """Return the plan and begin an empty one. O(transfers + rows written).

        Raises:
            RuntimeError: the last plan was not carried out.
        """
        if self.num_done < self.num_taken:
            raise RuntimeError(NOT_DONE)
        self.num_taken += 1
        if not (self._transfers or self._changed or self._restores):
            self.num_done = self.num_taken
            return NOTHING_DUE
        plan = StepPlan(
            tuple(self._transfers),
            self.due_row_writes(),
            tuple(self._restores.values()),
        )
        plan._queue, plan._number = self, self.num_taken
        for lease in self._changed:
            lease.row_write_taken()
        self._transfers, self.num_moves = [], 0
        self._changed.clear()
        self._restores.clear()
        return plan

    @property
    def is_due(self) -> bool:
        """True if any work is not carried out, in a plan that was taken or in the next. O(1)."""
        is_open = self.num_done < self.num_taken
        return is_open or bool(self._transfers or self._changed or self._restores)

    def forget_open_plan(self) -> None:
        """Forget a plan that was taken but not carried out, as everything that needed it is gone.

        O(1).
        """
        self.num_done = self.num_taken

    def take_transfers(self) -> tuple[Transfer, ...]:
        """Return the transfers alone and forget them; the rest stays due."""
        transfers, self._transfers, self.num_moves = tuple(self._transfers), [], 0
        return transfers

    def due_row_writes(self) -> tuple[RowWrite, ...]:
        """Return the row writes of the next plan, which stay due. O(rows written)."""
        writes = [lease.row_write() for lease in self._changed]
        return tuple(write for write in writes if write is not None)

    @property
    def num_restores(self) -> int:
        """Restores that no plan contains yet. O(1)."""
        return len(self._restores)

    def check(self) -> None:
        """AssertionError unless the table names every slab in which a lease has rows. O(rows)."""
        for lease, number in self._numbers.items():
            assert self._leases[number] is lease, f"lease {number} is not notified of moves"
            end = self._unindexed.get(lease)
            rows = lease.rows_from(0)
            if end is not None:
                rows = rows[: len(rows) - len(lease.rows_from(end))]
            is_known = self._is_in_slab[number, rows // self._slab_rows]
            assert is_known.all(), f"rows of lease {number} are in a slab that is not noted"


NOTHING_DUE = StepPlan()
