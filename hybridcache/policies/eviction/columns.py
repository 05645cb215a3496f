"""Candidates as parallel arrays, for policies in which all scores change with every request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hybridcache.policies.protocol import Item


class Columns:
    """Items with three numbers each, so that a victim is one vector expression.

    Removal moves the last item into the gap: O(1).
    """

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.places: dict[Item, int] = {}
        self.cells: npt.NDArray[np.int64] = np.zeros(64, np.int64)
        """Start of the item's class in a table of all classes."""
        self.times: npt.NDArray[np.int64] = np.zeros(64, np.int64)
        """Logical time of the last use, or of the entry into the class."""
        self.worths: npt.NDArray[np.float64] = np.zeros(64)
        """Value of a use per byte."""

    def __len__(self) -> int:
        return len(self.items)

    def __contains__(self, item: Item) -> bool:
        return item in self.places

    def rows(self) -> list[list[Any]]:
        """Return [serial, cell, time, worth] of each item, in their order."""
        columns = (
            column[: len(self.items)].tolist() for column in (self.cells, self.times, self.worths)
        )
        serials = [item.serial for item in self.items]
        return [list(row) for row in zip(serials, *columns, strict=True)]

    @classmethod
    def of(cls, rows: Iterable[Sequence[Any]], item_of: Callable[[int], Item | None]) -> Columns:
        """Return the columns with these ``rows``, without items that no longer exist."""
        found = cls()
        for serial, cell, time, worth in rows:
            item = item_of(serial)
            if item is not None:
                found.put(item, cell, time, worth)
        return found

    def put(self, item: Item, cell: int, time: int, worth: float) -> None:
        """Add ``item`` or change its numbers. O(1) amortised."""
        place = self.places.get(item)
        if place is None:
            place = self.places[item] = len(self.items)
            self.items.append(item)
            if place == len(self.cells):
                self.cells, self.times = doubled(self.cells), doubled(self.times)
                self.worths = doubled(self.worths)
        self.cells[place], self.times[place], self.worths[place] = cell, time, worth

    def remove(self, item: Item) -> None:
        """Remove ``item``; the last item takes its place. O(1). Raises KeyError if it is absent."""
        place, last = self.places.pop(item), self.items.pop()
        if last is not item:
            end = len(self.items)
            self.items[place] = last
            self.places[last] = place
            for column in (self.cells, self.times, self.worths):
                column[place] = column[end]


def doubled(table: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return ``table`` with as many rows of zeros after its own."""
    return np.concatenate((table, np.zeros_like(table)))
