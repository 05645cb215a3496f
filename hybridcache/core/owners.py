"""Who in the tree owns a row of an arena, known without a search; and what a move changes.

The rows of what one insert brought are one buffer, and the nodes that came of it by splits hold
views of it (``radix.compact``). So a row has a place in a buffer, whatever is split, and renaming
it there renames it in the node. A table of all rows holds these places. It is brought up to date
only when a slab is emptied: what comes and goes between two moves costs an entry in a dictionary.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from hybridcache.allocators.moves import Move
from hybridcache.core.gathers import GatherCache
from hybridcache.tokens import Indices

_OFFSET_BITS = 32


class RowOwners:
    """The buffers of one tree. A ``RowHolder``, which owns the cached rows."""

    __slots__ = ("_free_numbers", "_gathered", "_new", "_numbered", "_places")

    def __init__(self, num_rows: int, gathered: GatherCache) -> None:
        """``gathered``: answers that name rows too; they are forgotten when rows move."""
        self._gathered = gathered
        # Number of a row's buffer, and its offset there: right for rows that the tree had at the
        # last move and still has. Host memory is taken as rows are used.
        self._places = np.zeros(num_rows, np.int64)
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
        number = self._places.item(gone.item(0)) >> _OFFSET_BITS
        self._numbered[number] = living
        if living is None:
            self._free_numbers.append(number)

    def rows_moved(self, move: Move) -> int:
        """Rename ``move``'s rows in their buffers; how many are cached. O(rows that move + rows
        that came since the last move)."""
        self._gathered.clear()
        self._number_new()
        places = self._places.take(move.src)
        self._places[move.dst.astype(np.intp)] = places
        numbers = places >> _OFFSET_BITS
        offsets = places & ((1 << _OFFSET_BITS) - 1)
        if len(self._numbered) < 1 << 16:
            numbers = numbers.astype(np.uint16)  # sorted in linear time
        order = numbers.argsort(kind="stable")
        numbers, offsets = numbers.take(order), offsets.take(order)
        src, dst = move.src.take(order), move.dst.take(order)
        starts = [0, *(np.flatnonzero(numbers[1:] != numbers[:-1]) + 1).tolist(), len(numbers)]
        num_owned = 0
        for start, end in pairwise(starts):
            if start == end:
                continue
            number = numbers.item(start)
            rows = self._numbered[number] if number < len(self._numbered) else None
            if rows is not None:
                group = slice(start, end)
                num_owned += _rename(rows, offsets[group], src[group], dst[group])
        return num_owned

    def _number_new(self) -> None:
        if not self._new:
            return
        buffers = list(self._new.values())
        self._new.clear()
        bases, start = [], 0
        for rows in buffers:
            if self._free_numbers:
                number = self._free_numbers.pop()
                self._numbered[number] = rows
            else:
                number = len(self._numbered)
                self._numbered.append(rows)
            bases.append((number << _OFFSET_BITS) - start)
            start += len(rows)
        places = np.repeat(np.array(bases, np.int64), [len(rows) for rows in buffers])
        places += np.arange(start)
        # Four times as fast as with int32 for an index, which numpy casts a piece at a time.
        self._places[np.concatenate(buffers, dtype=np.intp)] = places

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
            if living is not None:
                places = (number << _OFFSET_BITS) + np.arange(len(living))
                assert (self._places[living] == places).all(), f"a row of buffer {number} is lost"
            assert (living is None) == (number in self._free_numbers), f"number {number} is lost"


def _buffer(rows: Indices) -> Indices:
    return rows if rows.base is None else rows.base


def _rename(rows: Indices, offsets: Indices, src: Indices, dst: Indices) -> int:
    """Put ``dst`` for ``src`` where ``rows`` has it at ``offsets``; how many it has. It lacks those
    that left the tree since they were given their place, and are held by a request now."""
    owned = rows.take(offsets, mode="clip") == src
    if np.count_nonzero(owned) < len(owned):
        offsets, dst = offsets[owned], dst[owned]
    rows[offsets] = dst
    return len(dst)
