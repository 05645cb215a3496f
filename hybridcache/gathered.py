"""Rows that were gathered lately: a conversation's next turn asks for what its last one was told."""

from __future__ import annotations

from collections import OrderedDict

from hybridcache.interface import Indices
from hybridcache.radix.node import Segment


class RecentGathers:
    """The latest answers of ``gather``, by the segment they end with; together no more tokens than are cached.

    An answer stays true for as long as its segment is resident, whatever is split above or below: rows never move. An
    evicted segment never comes back (its tokens would get a new one), so a stale answer is never asked for, only crowded out.
    """

    __slots__ = ("_num_tokens", "_rows")

    def __init__(self) -> None:
        self._rows: OrderedDict[Segment, Indices] = OrderedDict()
        self._num_tokens = 0

    def get(self, segment: Segment) -> Indices | None:
        """The rows from the root to the end of ``segment``, if they are known. O(1)."""
        return self._rows.get(segment)

    def keep(
        self, segment: Segment, rows: Indices, extends: Segment | None, limit_tokens: int
    ) -> None:
        """Remember an answer. What goes while not all fit ``limit_tokens``: first an answer that a later one ``extends``
        (its conversation went on), then the oldest, never the newest. O(1) amortised."""
        known = self._rows
        if extends is not None:
            known.move_to_end(extends, last=False)
        known[segment] = rows
        num_tokens = self._num_tokens + len(rows)
        while num_tokens > limit_tokens and len(known) > 1:
            _, dropped = known.popitem(last=False)
            num_tokens -= len(dropped)
        self._num_tokens = num_tokens
