"""Moves of rows within the device, and copies between the device and the tiers.

Rows of an arena that move, who is notified, and the order in which the tensors follow.

A slab is emptied when a slot wants one and none is free (``allocators.arena``). Its living rows are
then elsewhere, at once and for all who keep their numbers; the bytes follow before they are next
read.

Order, for whoever owns the tensors (a holder that owns no rows, such as ``PendingMoves``). Before
the next step reads or writes anything it does, in this order:

1. the moves, in the order in which they were notified: ``memory[dst] = memory[src]``. Within a move
   no row is in both; a later move may well read what an earlier one wrote, or write what an earlier
   one read;
2. the state copies of requests that resume (checkpoint slot to own slot);
3. the step itself: it writes the KV rows and checkpoint slots that it was given.

This fixed order is safe. A slot is handed out after its slab was emptied, so all that is written to
slots (2, 3) must follow the moves before it (1). A move that comes *later* in the same round writes
only to rows, and reads only from rows, of KV slabs. It could disturb a state copy only through a
slot that was freed in between: the source of a copy is a checkpoint that the request locks until it
publishes, which is after its first step, and the target is the request's own; if the request ends
before that step, its copy is dropped. So no slot of a copy that is still to be made is ever KV.

The indices are older than the bytes: tree and leases name the new rows as soon as ``rows_moved``
has returned. What a caller has copied from a lease before (a request table) it writes again where
``Lease.take_moved`` says, after all else that it has to write there.

A step in flight (overlap) may still read and write old rows: what is in the arena when it ends is
what must move, new KV with it. So moves are ordered after it on the device's stream, and the next
step after them; nothing waits on the host. A move that was taken must be made even if the step for
which it was taken comes out empty: its indices are in force already.

What has to be copied between the device and the memories below it, in order.

A cache with lower tiers (``core.lower``) changes its numbers at once: what it spills or fetches is
elsewhere for all who ask, and rows that were left are handed out again. The bytes follow before
they are next read. So all orders stand in one list, the moves of a device arena among them, and
whoever owns the tensors makes them as if each were complete before the next begins: one may
overwrite what an earlier one reads, or read what an earlier one writes. They come before all that
the next step reads or writes (the copies of states that resume included, see
``allocators.moves``).

Work may overlap where no row is in both hands. A copy to the device that is still under way is of a
slot that nobody else writes; a request that resumes from it waits.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from hybridcache.tokens import Indices, Tokens


class Move(NamedTuple):
    """The living rows of one slab, and where they are from now on."""

    slab: int
    src: Indices
    """Rows of ``slab`` that were taken, ascending: int32[n], n <= ``slab_rows``, whole pages."""
    dst: Indices
    """Where each is now, in other slabs: int32[n]."""
    new_rows: Indices
    """By the offset in the slab: the new row, or the old one where nothing lived.
    int32[``slab_rows``]."""

    def rename(self, rows: Indices) -> npt.NDArray[np.intp]:
        """Put new rows for old into ``rows``, int32[k], in place; the positions that changed,
        ascending. O(k)."""
        size = len(self.new_rows)
        offsets = rows - np.int32(self.slab * size)
        positions = (offsets.view(np.uint32) < size).nonzero()[0]
        if len(positions):
            rows[positions] = self.new_rows.take(offsets.take(positions))
        return positions


class RowHolder(Protocol):
    """Whoever keeps row numbers of an arena. Hashable, by identity."""

    def rows_moved(self, move: Move) -> int:
        """Rename what is kept of ``move.src``, at once; return how many of these rows are owned
        here. Must not call the arena."""
        ...


class PendingMoves:
    """Moves that are still to be made on the tensors, in order. A holder that owns no rows."""

    __slots__ = ("_moves",)

    def __init__(self) -> None:
        self._moves: list[Move] = []

    def __len__(self) -> int:
        """Slabs that were emptied since the last ``take``. A scheduler that wants at most one a
        step stops adding work to the step then; refusing a slot instead would decide otherwise than
        the simulator does."""
        return len(self._moves)

    @property
    def num_moves(self) -> int:
        """As ``len``."""
        return len(self._moves)

    def rows_moved(self, move: Move) -> int:
        """Keep ``move`` for ``take``."""
        self._moves.append(move)
        return 0

    def take(self) -> tuple[Move, ...]:
        """All since the last time, given out once: the caller makes them, in this order, before
        anything else."""
        moves, self._moves = tuple(self._moves), []
        return moves


DEVICE, HOST, DISK = "device", "host", "disk"
"""The tiers' words, the nearest first."""


class Copy(NamedTuple):
    """Bytes that go from one tier to another."""

    kind: Literal["kv", "checkpoint"]
    src_tier: str
    src: Indices
    """Rows there: int32[n]. Of a checkpoint on the device: int32[1], its slot."""
    dst_tier: str
    dst: Indices
    """As ``src``. KV has as many here as there; a state fills its rows in this order, row by
    row."""
    position: int
    """Tokens from the root to the end of what is copied: KV is of the ``len(src)`` tokens before
    it."""
    path: tuple[Hashable, Tokens] | None = None
    """(namespace, tokens[:position]) of what goes to disk; else None."""


class Drop(NamedTuple):
    """What rows on disk held is no more in the tree."""

    tier: str
    rows: Indices


Order = Move | Copy | Drop


class Orders:
    """Orders that are still to be made. A holder of the device's arena that owns no rows, in place
    of ``PendingMoves``."""

    __slots__ = ("_orders", "num_moves")

    def __init__(self) -> None:
        self._orders: list[Order] = []
        self.num_moves = 0
        """Slabs that were emptied since the last ``take``."""

    def __len__(self) -> int:
        return len(self._orders)

    def rows_moved(self, move: Move) -> int:
        """Keep ``move`` for ``take``."""
        self.add(move)
        return 0

    def add(self, order: Order) -> None:
        """Keep ``order`` for ``take``. O(1)."""
        self._orders.append(order)
        self.num_moves += isinstance(order, Move)

    def take(self) -> tuple[Order, ...]:
        """All since the last time, given out once: the caller makes them, in this order, before
        anything else."""
        orders, self._orders, self.num_moves = tuple(self._orders), [], 0
        return orders
