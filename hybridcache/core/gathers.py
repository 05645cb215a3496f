"""Rows that were gathered lately: a conversation's next turn asks for what its last one
got."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from hybridcache.radix.node import Segment
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
