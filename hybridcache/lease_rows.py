"""The KV row of every position of a request: whose each is, which were read, which have moved."""

from __future__ import annotations

import numpy as np

from hybridcache.allocators.moves import Move
from hybridcache.tokens import Indices

SPARE_ROWS = 512
"""Room for the rows of a short answer, so that they need no second array."""


class LeaseRows:
    """Rows of one lease: the tree's in [0, ``published_len``), held ones in [``published_len``,
    ``num_rows``). A holder of an arena (``RowHolder``)."""

    __slots__ = (
        "_moved",
        "_rows",
        "_unread_end",
        "_unread_start",
        "num_rows",
        "published_len",
    )

    def __init__(self, cached_len: int, num_expected: int) -> None:
        """The tree's for ``cached_len`` positions, and room for ``num_expected``."""
        self.num_rows = cached_len
        self.published_len = cached_len
        # Rows in [_unread_start, _unread_end) are the tree's and stand in it alone: a caller that
        # moves no tensors never asks for them. All others are here, up to date.
        self._unread_start, self._unread_end = 0, cached_len
        self._rows: Indices = np.empty(num_expected + SPARE_ROWS, np.int32)
        self._moved: tuple[int, int] | None = None

    @property
    def unread_len(self) -> int:
        """How far the tree's rows must be known for ``view``; 0: all are. O(1)."""
        return self._unread_end if self._unread_start < self._unread_end else 0

    def read(self, gathered: Indices) -> None:
        """Take from ``gathered``, the tree's from the first position on, those that were not read.
        O(``unread_len``)."""
        start, end = self._unread_start, self._unread_end
        self._rows[start:end] = gathered[start:end]
        self._unread_start = end

    def view(self, start: int, end: int) -> Indices:
        """Of positions [start, end): int32, a view; what was not read is undefined. O(1)."""
        return self._rows[start:end]

    def append(self, rows: Indices) -> None:
        """Hold ``rows``, int32[k], for the next k positions. O(k), and amortised what is there."""
        end = self.num_rows + len(rows)
        if end > len(self._rows):
            larger = np.empty(max(end, 2 * len(self._rows)), np.int32)
            for known in (
                slice(0, self._unread_start),
                slice(self._unread_end, self.num_rows),
            ):
                larger[known] = self._rows[known]
            self._rows = larger
        self._rows[self.num_rows : end] = rows
        self.num_rows = end

    def publish(self, to_len: int, num_duplicates: int) -> None:
        """The rows below ``to_len`` are the tree's, and the first ``num_duplicates`` of those that
        were held are others now than were here. O(1)."""
        first = self.published_len
        self.published_len = to_len
        if num_duplicates:
            if self._unread_start == self._unread_end:
                self._unread_start = first
            self._unread_end = first + num_duplicates

    def rows_moved(self, move: Move) -> int:
        """A slab of the arena was emptied (``RowHolder``): rename what is here of its rows; how
        many are held. O(``num_rows``), a nanosecond each."""
        first_known = self._unread_end
        moved = move.rename(self._rows[first_known : self.num_rows]) + first_known
        num_held = len(moved) - int(np.searchsorted(moved, self.published_len))
        if self._unread_start:
            moved = np.concatenate((move.rename(self._rows[: self._unread_start]), moved))
        if len(moved):
            start, end = int(moved[0]), int(moved[-1]) + 1
            if self._moved is not None:
                start, end = min(start, self._moved[0]), max(end, self._moved[1])
            self._moved = start, end
        return num_held

    def take_moved(self) -> tuple[int, int] | None:
        """(start, end) of the positions that ``rows_moved`` changed since the last time; None:
        none. O(1)."""
        moved, self._moved = self._moved, None
        return moved

    def clear(self) -> None:
        """Forget them all: the lease has ended. O(1)."""
        self.num_rows = self.published_len = self._unread_start = self._unread_end = 0
        self._moved = None
