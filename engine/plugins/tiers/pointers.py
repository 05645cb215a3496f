"""Pointers from the rows of a tier into records."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from engine.plugins.tiers.prefixes import Piece
from hybridcache.tokens import Indices


class Part(NamedTuple):
    """Consecutive rows of a request that point to consecutive rows of one record."""

    first: int
    """Place of the first one in the request."""
    num_rows: int
    record: int
    """Id of the record. 0 if the rows point nowhere."""
    offset: int
    """Row of the record that the first one points to."""


class Pointers:
    """A record id and a row of that record for each row of a tier.

    Rows that are together in a record are requested together, so all methods work on runs of rows.
    """

    def __init__(self, num_rows: int) -> None:
        self._records = np.zeros(num_rows, np.int64)
        """0 for a row that points nowhere."""
        self._offsets = np.zeros(num_rows, np.int32)
        self._counts: dict[int, int] = {}
        """Number of rows that point into each record."""

    def __contains__(self, record: int) -> bool:
        """True if a row points into ``record``. O(1)."""
        return record in self._counts

    def bind(self, rows: Indices, pieces: list[Piece]) -> None:
        """Let ``rows`` point into ``pieces``; those past their end point nowhere. O(rows)."""
        self.unbind(rows)
        first = 0
        for piece in pieces:
            some = rows[first : first + piece.num_tokens]
            if not len(some):
                return
            self._records[some] = piece.id
            self._offsets[some] = np.arange(piece.offset, piece.offset + len(some), dtype=np.int32)
            self._counts[piece.id] = self._counts.get(piece.id, 0) + len(some)
            first += piece.num_tokens

    def unbind(self, rows: Indices) -> Collection[int]:
        """Let ``rows`` point nowhere; returns the records they pointed into. O(rows)."""
        found: dict[int, None] = {}
        for part in self.parts(rows):
            if part.record:
                found[part.record] = None
                self._counts[part.record] -= part.num_rows
                if not self._counts[part.record]:
                    del self._counts[part.record]
        self._records[rows] = 0
        return found

    def parts(self, rows: Indices) -> list[Part]:
        """The parts of records that ``rows`` point to, in the order of ``rows``. O(rows)."""
        if not len(rows):
            return []
        records, offsets = self._records[rows], self._offsets[rows]
        breaks = np.flatnonzero((np.diff(records) != 0) | (np.diff(offsets) != 1)) + 1
        firsts = [0, *breaks.tolist()]
        return [
            Part(first, end - first, records.item(first), offsets.item(first))
            for first, end in zip(firsts, [*firsts[1:], len(rows)], strict=True)
        ]

    def lose(self, record: int) -> None:
        """Let no row point into ``record``. O(rows of the tier)."""
        if self._counts.pop(record, None) is not None:
            self._records[self._records == record] = 0

    def clear(self) -> None:
        """Let no row point anywhere. O(rows of the tier)."""
        self._records[:] = 0
        self._counts.clear()

    def check(self) -> None:
        """AssertionError unless the rows of each record are counted. O(rows of the tier)."""
        records, counts = np.unique(self._records[self._records != 0], return_counts=True)
        found = dict(zip(records.tolist(), counts.tolist(), strict=True))
        assert found == self._counts, f"rows point into {found}, counted {self._counts}"
