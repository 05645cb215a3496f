"""Which KV rows belong to which node, and their concatenation along a path.

Rows that were gathered lately: a conversation's next turn asks for what its last one
got.

Who in the tree owns a row of an arena, known without a search; and what a move changes.

The rows of what one insert brought are one buffer, and the nodes that came of it by splits hold
views of it (``radix.compact``). So a row has a buffer, whatever is split, and renaming it there
renames it in the node. A table of all rows holds the numbers of their buffers. It is brought up to
date only when a slab is emptied: what comes and goes between two moves costs an entry in a
dictionary.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from hybridcache.allocators.moves import Move
from hybridcache.radix.tree import Segment
from hybridcache.tokens import Indices

ENTRY_ROWS = 64
"""What an answer takes beside its rows, in rows of 4 bytes (measured: the array's head and the
entry of the dictionary)."""


class GatherCache:
    """The latest answers of ``gather``, by the segment they end with.

    An answer stays true for as long as its segment is resident, whatever is split above or below,
    until rows move (in an arena: then all are dropped); it goes with its segment. All together
    weigh no more than the rows that are cached, or only the newest is left: then they are over by
    ``ENTRY_ROWS`` at most.
    """

    __slots__ = ("num_rows", "rows")

    def __init__(self) -> None:
        self.rows: OrderedDict[Segment, Indices] = OrderedDict()
        self.num_rows = 0
        """What all answers weigh."""

    def __len__(self) -> int:
        return len(self.rows)

    def get(self, segment: Segment) -> Indices | None:
        """The rows from the root to the end of ``segment``, if they are known. O(1)."""
        return self.rows.get(segment)

    def join(self, segment: Segment, limit_rows: int) -> Indices:
        """The rows from the root to the end of ``segment``, from the pieces on its path, and
        ``keep`` them: read-only. O(rows)."""
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
        self.keep(segment, rows, extends, limit_rows)
        return rows

    def keep(
        self, segment: Segment, rows: Indices, extends: Segment | None, limit_rows: int
    ) -> None:
        """Remember an answer. Before all others goes one that a later one ``extends``: its
        conversation went on. O(1) amortised."""
        if extends is not None:
            self.rows.move_to_end(extends, last=False)
        self.rows[segment] = rows
        self.num_rows += len(rows) + ENTRY_ROWS
        if self.num_rows > limit_rows:
            self.trim(limit_rows)

    def discard(self, segment: Segment) -> None:
        """``segment``, an answer's, is resident no more. O(1)."""
        self.num_rows -= len(self.rows.pop(segment)) + ENTRY_ROWS

    def trim(self, limit_rows: int) -> None:
        """Let the oldest go until the rest fits, or only the newest is left."""
        known = self.rows
        while self.num_rows > limit_rows and len(known) > 1:
            _, rows = known.popitem(last=False)
            self.num_rows -= len(rows) + ENTRY_ROWS

    def check(self, limit_rows: int) -> None:
        """O(answers)."""
        num_rows = sum(len(rows) + ENTRY_ROWS for rows in self.rows.values())
        assert num_rows == self.num_rows, f"gathers weigh {num_rows} rows, counted {self.num_rows}"
        assert num_rows <= limit_rows + ENTRY_ROWS, "gathers are over their limit"
        for segment, rows in self.rows.items():
            assert segment.node.kv is segment, f"gather of {segment}, which is gone"
            assert len(rows) == segment.position, f"gather of {segment} has {len(rows)} rows"

    def clear(self) -> None:
        self.rows.clear()
        self.num_rows = 0


class RowOwners:
    """The buffers of one tree. A ``RowHolder``, which owns the cached rows."""

    __slots__ = ("_free_numbers", "_gathered", "_new", "_numbered", "_numbers")

    def __init__(self, num_rows: int, gathered: GatherCache) -> None:
        """``gathered``: answers that name rows too; they are forgotten when rows move."""
        self._gathered = gathered
        # By row the number of its buffer: right for rows that the tree had at the last move and
        # still has. Host memory is taken as rows are used.
        self._numbers = np.zeros(num_rows, np.int32)
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
        number = self._numbers.item(gone.item(0))
        self._numbered[number] = living
        if living is None:
            self._free_numbers.append(number)

    def rows_moved(self, move: Move) -> int:
        """Rename ``move``'s rows in their buffers; how many are cached. O(rows of those buffers +
        rows that came since the last move)."""
        self._gathered.clear()
        self._number_new()
        numbers = self._numbers.take(move.src)
        self._numbers[move.dst.astype(np.intp)] = numbers
        num_owned = 0
        for number in np.flatnonzero(np.bincount(numbers)).tolist():
            # A row that left the tree still has its old number, which may be another's by now, or
            # nobody's: what counts is what the buffer holds.
            rows = self._numbered[number] if number < len(self._numbered) else None
            if rows is not None:
                num_owned += len(move.rename(rows))
        return num_owned

    def _number_new(self) -> None:
        if not self._new:
            return
        buffers = list(self._new.values())
        self._new.clear()
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
                assert (self._numbers[living] == number).all(), f"a row of buffer {number} is lost"
            assert (living is None) == (number in self._free_numbers), f"number {number} is lost"


def _buffer(rows: Indices) -> Indices:
    return rows if rows.base is None else rows.base
