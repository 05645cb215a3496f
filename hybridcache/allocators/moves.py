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

The order is safe:

- All writes to slots (3 and the step) follow the transfers (1), because a slot is allocated after
  its slab was emptied.
- Moves touch only rows of KV slabs. The source of a restore is locked, its target is the request's
  own slot, and the restore of a request that ends before is dropped from the plan.
- A step in flight may still read and write old rows, so on a device with streams the transfers
  follow it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int32]
"""KV indices: contiguous int32, one per token."""


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


class TableOwner(Protocol):
    """Owner of a row in the request table: a lease. Hashable by identity."""

    @property
    def kv_indices(self) -> Indices:
        """KV rows of all positions so far: int32[n]."""


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
    path: tuple[Hashable, npt.NDArray[np.int32]] | None = None
    """(namespace, tokens[:position]) for copies to disk, else None."""


class Drop(NamedTuple):
    """Rows on disk with contents that are no longer in the tree. They can be reused; nothing has to
    be done."""

    tier: str
    """Tier of the rows: ``disk``."""
    rows: Indices
    """int32[n]. An engine that keeps files finds them in its own index of ``Copy.path`` by row."""


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


class StepMemory:
    """Owner of the tensors, for ``StepPlan.carry_out``: a class that derives from this one.

    Two pools need ``restore``. An arena adds ``move``, tiers add ``copy``, and requests with a
    ``table_row`` add ``write_row``. A plan that needs a missing method raises TypeError.
    """

    def move(self, move: Move) -> None:
        """Copy rows ``move.src`` of the arena to ``move.dst``."""
        raise self._lacks("move")

    def copy(self, copy: Copy) -> None:
        """Copy ``copy.src`` of ``copy.src_tier`` to ``copy.dst`` of ``copy.dst_tier``, rows or one
        state (``copy.kind``)."""
        raise self._lacks("copy")

    def write_row(self, write: RowWrite) -> None:
        """Write ``write.kv_indices`` into row ``write.table_row``, from ``write.start`` on."""
        raise self._lacks("write_row")

    def restore(self, checkpoint: int, own: int) -> None:
        """Copy the state in slot ``checkpoint`` to slot ``own``, which is ``own_slot`` if the
        request has one."""
        raise self._lacks("restore")

    def _lacks(self, name: str) -> TypeError:
        kind = type(self).__name__
        return TypeError(f"{kind} has no method {name}, which this step plan needs: see StepMemory")


SPENT = (
    "this step plan was carried out, failed half-way, or was forgotten by reset: doing its work "
    "again destroys rows. Take one plan per step with cache.take_step(). After a failure abort all "
    "leases, unlock all nodes and call cache.reset()"
)
NOT_CARRIED_OUT = (
    "the last step plan was taken but not carried out, so rows and states are not what the cache "
    "counts on: call plan.carry_out(memory), or plan.done() after doing its work yourself, before "
    "computing. If it failed half-way, abort all leases, unlock all nodes and call cache.reset()"
)


@dataclass(slots=True)  # not frozen: that costs a microsecond per plan
class StepPlan:
    """All work on the tensors that is due before the next step, in this order.

    Carry it out with ``carry_out``. Or do its work yourself and then call ``done``; a caller
    without tensors calls ``done`` alone. A plan that was taken must be carried out, even if its
    step computes nothing. ``examples/04_minimal_engine.py`` carries plans out with numpy arrays.

    >>> import numpy as np
    >>> from hybridcache import CacheConfig, build_prefix_cache
    >>> from hybridcache.allocators.moves import StepMemory
    >>> class Rows(StepMemory):
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
    """(checkpoint slot, own slot) of each request that resumes: slots of the cache, but an
    ``own_slot`` is in the caller's memory."""
    is_done: bool = False
    """True once the plan was carried out."""
    was_begun: bool = False
    """True once any of its work may have been done, or ``reset`` has forgotten it."""

    def __bool__(self) -> bool:
        """Return True if any work is due."""
        return bool(self.transfers or self.row_writes or self.restores)

    def carry_out(self, memory: StepMemory) -> None:
        """Call the method of ``memory`` for each piece of work, in order, and note that it is done.

        Drops are skipped. O(work). Raises RuntimeError if the plan was carried out before, or if a
        call failed half-way, or the cache was reset.
        """
        if self.is_done or self.was_begun:
            raise RuntimeError(SPENT)
        self.was_begun = True
        for transfer in self.transfers:
            if isinstance(transfer, Move):
                memory.move(transfer)
            elif isinstance(transfer, Copy):
                memory.copy(transfer)
        for write in self.row_writes:
            memory.write_row(write)
        for checkpoint, own in self.restores:
            memory.restore(checkpoint, own)
        self.is_done = True

    def done(self) -> None:
        """Note that all of the work is done, or queued before the step on the same device. O(1).

        Raises RuntimeError if ``carry_out`` failed half-way, or the cache was reset.
        """
        if self.was_begun and not self.is_done:
            raise RuntimeError(SPENT)
        self.is_done = True


class StepQueue:
    """The next ``StepPlan`` of one cache while it grows. A ``RowHolder`` that records the moves."""

    def __init__(self) -> None:
        self.num_moves = 0
        """Slabs emptied since the last ``take``. A scheduler that allows at most one per step stops
        adding requests to the step when it is 1."""
        self.transfers: list[Transfer] = []
        """Transfers that no plan contains yet."""
        self.restores: dict[TableOwner, tuple[int, int]] = {}
        """(checkpoint slot, own slot) of each lease with a restore that no plan contains yet."""
        self.row_writes: dict[TableOwner, tuple[int, int, int]] = {}
        """(table row, start, end) of the changed rows of each lease that no plan contains yet."""
        self.open_plan: StepPlan | None = None
        """Plan that was taken last, or None if nothing was due."""

    def rows_moved(self, move: Move) -> int:
        """Include ``move`` in the next plan, and return 0: no row is owned here."""
        self.transfers.append(move)
        self.num_moves += 1
        return 0

    def due_row_writes(self) -> tuple[RowWrite, ...]:
        """Return the row writes of the next plan, which stay due. O(rows written)."""
        return tuple(
            RowWrite(table_row, start, lease.kv_indices[start:end].copy())
            for lease, (table_row, start, end) in self.row_writes.items()
        )

    def take(self) -> StepPlan:
        """Return the plan and begin an empty one. Raises RuntimeError if the last plan was not
        carried out. O(transfers + rows written)."""
        if self.open_plan is not None and not self.open_plan.is_done:
            raise RuntimeError(NOT_CARRIED_OUT)
        if not (self.transfers or self.row_writes or self.restores):
            return StepPlan()
        row_writes = self.due_row_writes() if self.row_writes else ()
        plan = StepPlan(tuple(self.transfers), row_writes, tuple(self.restores.values()))
        self.transfers, self.num_moves = [], 0
        self.row_writes.clear()
        self.restores.clear()
        self.open_plan = plan
        return plan

    def take_transfers(self) -> tuple[Transfer, ...]:
        """Return the transfers alone and forget them; the rest stays due."""
        transfers, self.transfers, self.num_moves = tuple(self.transfers), [], 0
        return transfers
