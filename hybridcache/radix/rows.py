"""KV rows along a path, and the node that owns each row.

``GatherCache`` keeps concatenated rows of recent paths, because the next turn of a conversation
needs those of its last one.

``RowIndex`` finds the rows of an emptied arena slab in the tree without a search. The rows of one
insertion are one buffer, and nodes that result from splits hold views of it (``radix.compact``). So
a row has one buffer regardless of splits, and renaming it there renames it in the node. A table of
all rows holds the numbers of their buffers. It is updated only when a slab is emptied: until then,
a change costs one dictionary entry.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from hybridcache.allocators.moves import Move
from hybridcache.radix.tree import Segment
from hybridcache.tokens import Indices

ENTRY_ROWS = 64
"""Overhead of one cached result, in rows of 4 bytes (measured: array header and dictionary entry).
"""


class GatherCache:
    """Recent results of ``gather``, by their last segment.

    A result is valid while its segment is resident, regardless of splits, until rows move (then all
    are dropped). It is removed with its segment. All together weigh no more than the cached rows,
    or only the newest remains: then they exceed the limit by at most ``ENTRY_ROWS``.
    """

    __slots__ = ("num_rows", "rows")

    def __init__(self) -> None:
        self.rows: OrderedDict[Segment, Indices] = OrderedDict()
        """Rows from the root to the end of each segment."""
        self.num_rows = 0
        """Weight of all results, in rows."""

    def __len__(self) -> int:
        return len(self.rows)

    def join(self, segment: Segment, limit_rows: int) -> Indices:
        """Concatenate the rows from the root to the end of ``segment``, and keep the result.
        O(rows).

        The result is read-only.
        """
        parts = [segment.indices]
        extends = None
        above = segment.node.parent
        while above is not None and above.kv is not None:
            known = self.rows.get(above.kv)
            if known is not None:
                parts.append(known)
                extends = above.kv
                break
            parts.append(above.kv.indices)
            above = above.parent
        parts.reverse()
        rows = np.concatenate(parts)
        rows.setflags(write=False)
        if extends is not None:  # Evicted before all others, because its conversation continued.
            self.rows.move_to_end(extends, last=False)
        self.rows[segment] = rows
        self.num_rows += len(rows) + ENTRY_ROWS
        if self.num_rows > limit_rows:
            self.trim(limit_rows)
        return rows

    def discard(self, segment: Segment) -> None:
        """Remove the result of ``segment``, which is no longer resident. O(1)."""
        self.num_rows -= len(self.rows.pop(segment)) + ENTRY_ROWS

    def trim(self, limit_rows: int) -> None:
        """Remove the oldest results until the others fit in ``limit_rows``, or only the newest
        remains."""
        known = self.rows
        while self.num_rows > limit_rows and len(known) > 1:
            _, rows = known.popitem(last=False)
            self.num_rows -= len(rows) + ENTRY_ROWS

    def check(self, limit_rows: int) -> None:
        """Recompute the weight and check all results. O(results)."""
        num_rows = sum(len(rows) + ENTRY_ROWS for rows in self.rows.values())
        assert num_rows == self.num_rows, f"gathers weigh {num_rows} rows, counted {self.num_rows}"
        assert num_rows <= limit_rows + ENTRY_ROWS, "gathers are over their limit"
        for segment, rows in self.rows.items():
            assert segment.node.kv is segment, f"gather of {segment}, which is gone"
            assert len(rows) == segment.position, f"gather of {segment} has {len(rows)} rows"

    def clear(self) -> None:
        self.rows.clear()
        self.num_rows = 0


class RowIndex:
    """Row buffers of one tree. A ``RowHolder``, which owns the cached rows."""

    __slots__ = ("_free_numbers", "_gathered", "_numbered", "_numbers", "new")

    def __init__(self, num_rows: int, gathered: GatherCache) -> None:
        """``gathered``: cached results, which are dropped when rows move."""
        self._gathered = gathered
        # By row the number of its buffer: right for rows that the tree had at the last move and
        # still has. Host memory is taken as rows are used.
        self._numbers = np.zeros(num_rows, np.int32)
        self._numbered: list[Indices | None] = []
        """Living part of each buffer, by number."""
        self._free_numbers: list[int] = []
        self.new: dict[int, Indices] = {}
        """Buffers without a number yet, by identity. Callers add each new buffer here."""

    def shrink(self, gone: Indices, living: Indices | None) -> None:
        """Remove ``gone``, the last rows of a buffer. O(1).

        ``living`` is the remaining part, possibly in a new array, or None if nothing remains.
        """
        if self.new.pop(id(gone if gone.base is None else gone.base), None) is not None:
            if living is not None:
                self.new[id(_buffer(living))] = living
            return
        number = self._numbers.item(gone.item(0))
        self._numbered[number] = living
        if living is None:
            self._free_numbers.append(number)

    def rows_moved(self, move: Move) -> int:
        """Rename the rows of ``move`` in their buffers, and return how many of them are cached.

        O(rows of those buffers + rows added since the last move).
        """
        self._gathered.clear()
        self._number_new()
        numbers = self._numbers.take(move.src)
        self._numbers[move.dst.astype(np.intp)] = numbers
        found = [
            # A row that left the tree keeps its old number, which may be unused or reused by now.
            # Only the rows in the buffer count.
            rows
            for number in np.flatnonzero(np.bincount(numbers)).tolist()
            if number < len(self._numbered) and (rows := self._numbered[number]) is not None
        ]
        if not found:
            return 0
        renamed, start = np.concatenate(found), 0
        num_owned = len(move.rename(renamed))
        for rows in found:
            end = start + len(rows)
            rows[:] = renamed[start:end]
            start = end
        return num_owned

    def _number_new(self) -> None:
        if not self.new:
            return
        buffers = list(self.new.values())
        self.new.clear()
        numbers = []
        for rows in buffers:
            if self._free_numbers:
                numbers.append(number := self._free_numbers.pop())
                self._numbered[number] = rows
            else:
                numbers.append(len(self._numbered))
                self._numbered.append(rows)
        lengths = [len(rows) for rows in buffers]
        # Four times as fast as with int32 for an index, which numpy casts a piece at a time.
        index = np.concatenate(buffers, dtype=np.intp)
        self._numbers[index] = np.repeat(np.array(numbers, np.int32), lengths)

    def check(self, segments: list[Indices]) -> None:
        """Check that each row of ``segments``, the rows of all resident nodes, is in its buffer.
        O(rows).

        Raises:
            AssertionError: one is not.
        """
        numbered = [rows for rows in self._numbered if rows is not None]
        lengths: dict[int, int] = {}
        for rows in segments:
            base = _buffer(rows)
            lengths[id(base)] = lengths.get(id(base), 0) + len(rows)
        known = {id(_buffer(rows)): len(rows) for rows in (*numbered, *self.new.values())}
        assert known == lengths, "the buffers known are not those of the tree"
        for number, living in enumerate(self._numbered):
            if living is not None:
                assert (self._numbers[living] == number).all(), f"a row of buffer {number} is lost"
            assert (living is None) == (number in self._free_numbers), f"number {number} is lost"


def _buffer(rows: Indices) -> Indices:
    return rows if rows.base is None else rows.base
