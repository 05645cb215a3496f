"""Who in the tree owns a row of an arena, known without a search, and what happens there when a
slab is emptied.

The rows of what one insert brought are one buffer, and the nodes that came of it by splits hold
views of it (``radix.compact``). So a row belongs to a buffer, whatever is split, and renaming it in
the buffer renames it in the node. A table of all rows holds the number of each one's buffer. It is
brought up to date only when a slab is emptied: what is stored and goes between two moves costs an
entry in a dictionary.
"""

from __future__ import annotations

import numpy as np

from hybridcache.allocators.moves import Move
from hybridcache.core.gathers import RecentGathers
from hybridcache.tokens import Indices


class RowOwners:
    """The buffers of one tree. A ``RowHolder``, which owns the cached rows."""

    __slots__ = ("_free_numbers", "_gathered", "_new", "_numbered", "_table")

    def __init__(self, num_rows: int, gathered: RecentGathers) -> None:
        """``gathered``: answers that name rows too; they are forgotten when rows move."""
        self._gathered = gathered
        self._table = np.zeros(num_rows, np.int32)
        """Number of each row's buffer, as of the last move; right for rows that lived then."""
        self._numbered: list[Indices | None] = []
        """By number: what lives of a buffer."""
        self._free_numbers: list[int] = []
        self._new: dict[int, Indices] = {}
        """By identity of the buffer: those that have no number yet."""

    def add(self, rows: Indices) -> None:
        """A buffer came, all of it alive. O(1)."""
        self._new[id(rows)] = rows

    def shrink(self, gone: Indices, living: Indices | None) -> None:
        """``gone``, the last rows of a buffer, went; ``living`` is left of it, perhaps in a new
        array; None: nothing. O(1)."""
        if self._new.pop(id(_buffer(gone)), None) is not None:
            if living is not None:
                self._new[id(_buffer(living))] = living
            return
        number = self._table.item(gone.item(0))
        self._numbered[number] = living
        if living is None:
            self._free_numbers.append(number)

    def rows_moved(self, move: Move) -> int:
        """Rename ``move``'s rows in their buffers; how many are cached. O(rows that move + rows of
        their buffers + rows that came since the last move)."""
        self._gathered.clear()
        self._give_numbers()
        table, num_owned = self._table, 0
        for number in np.unique(table[move.src]).tolist():
            rows = self._numbered[number] if number < len(self._numbered) else None
            if rows is None:
                continue  # the rows left this buffer, and are held by a request now
            positions = move.rename(rows)
            table[rows[positions]] = number
            num_owned += len(positions)
        return num_owned

    def _give_numbers(self) -> None:
        for rows in self._new.values():
            if self._free_numbers:
                number = self._free_numbers.pop()
                self._numbered[number] = rows
            else:
                number = len(self._numbered)
                self._numbered.append(rows)
            self._table[rows] = number
        self._new.clear()

    def check(self, segments: list[Indices]) -> None:
        """``segments``: the rows of all resident nodes. AssertionError unless each is known in its
        buffer. O(rows)."""
        numbered = [rows for rows in self._numbered if rows is not None]
        lengths: dict[int, int] = {}
        for rows in segments:
            base = _buffer(rows)
            lengths[id(base)] = lengths.get(id(base), 0) + len(rows)
        known = {id(_buffer(rows)): len(rows) for rows in (*numbered, *self._new.values())}
        assert known == lengths, "the buffers known are not those of the tree"
        for number, living in enumerate(self._numbered):
            assert living is None or (self._table[living] == number).all(), (
                f"a row of buffer {number} is listed elsewhere"
            )
            assert (living is None) == (number in self._free_numbers), f"number {number} is lost"


def _buffer(rows: Indices) -> Indices:
    return rows if rows.base is None else rows.base
