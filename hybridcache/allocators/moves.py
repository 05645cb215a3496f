"""Rows of an arena that move, who is notified, and the order in which the tensors follow.

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
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from hybridcache.tokens import Indices


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
