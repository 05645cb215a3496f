"""What has to be copied between the device and the memories below it, in order.

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
from typing import Literal, NamedTuple

from hybridcache.allocators.moves import Move
from hybridcache.tokens import Indices, Tokens

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
