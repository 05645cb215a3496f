"""Tables of results: columns with units, typed cells, and their text for terminals and pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hybridcache.lab.results.result import text_table
from hybridcache.lab.traces.intervals import Interval

Cell = str | float | Interval | Sequence["Cell"] | Mapping[str, "Cell"] | None
"""Text, a number, a number with its interval, or several of them; None if it was not measured."""


class Column(NamedTuple):
    """Name, unit and format of one column."""

    name: str
    unit: str = ""
    """``%``, ``points``, ``s``; empty for texts, and for numbers without a unit."""
    form: str = ".1f"
    """Format of its numbers."""
    reference: str = ""
    """Reference that the column has, one of ``YARDSTICKS``, or empty."""

    @property
    def head(self) -> str:
        """Return the name with the unit."""
        return f"{self.name}, {self.unit}" if self.unit else self.name

    def text(self, cell: Cell) -> str:
        """Return a cell as text, an interval as ``67.1 ± 0.3``.

        The number after ± is the larger distance of a limit from the mean, so it never narrows an
        interval.

        >>> Column("hits", "%").text(Interval(67.12, 66.9, 67.4))
        '67.1 ± 0.3'
        """
        if cell is None or isinstance(cell, str):
            return "-" if cell is None else cell
        if isinstance(cell, Interval):
            mean, low, high = map(self.rounded, cell)
            if math.isnan(low):
                return self.text(cell.mean)
            return f"{self.text(cell.mean)} ± {max(mean - low, high - mean):{self.form}}"
        if isinstance(cell, Mapping):
            return ", ".join(f"{name}: {self.text(one)}" for name, one in cell.items())
        if isinstance(cell, Sequence):
            return ", ".join(map(self.text, cell))
        text = format(cell, self.form)
        return text.removeprefix("-") if self.rounded(cell) == 0 else text

    def rounded(self, number: float) -> float:
        """Return a number as it is written."""
        return float(format(number, self.form).replace(",", ""))

    def values(self, cell: Cell) -> list[Interval]:
        """Return the numbers of a cell as they are written, with their intervals; NaN for a text.
        Sentences and figures therefore agree with the table."""
        if isinstance(cell, Interval):
            return [Interval(*map(self.rounded, cell))]
        if cell is None or isinstance(cell, str | int | float):
            mean = math.nan if cell is None or isinstance(cell, str) else self.rounded(cell)
            return [Interval(mean, math.nan, math.nan)]
        cells = cell.values() if isinstance(cell, Mapping) else cell
        return [self.values(one)[0] for one in cells]


@dataclass(frozen=True, slots=True)
class Table:
    """Columns, and rows with a cell for each."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]

    def __str__(self) -> str:
        return text_table([one.head for one in self.columns], self.texts())

    def texts(self) -> list[list[str]]:
        """Return the cells of each row as text."""
        return [[one.text(cell) for one, cell in zip(self.columns, row, strict=True)]
                for row in self.rows]  # fmt: skip

    def place(self, key: str) -> int:
        """Return the number of the first column whose name begins with ``key``, or that has this
        reference."""
        return next(i for i, one in enumerate(self.columns)
                    if one.name.startswith(key) or one.reference == key)  # fmt: skip

    def numbers(self, key: str) -> list[list[Interval]]:
        """Return the numbers of each row in a column."""
        place = self.place(key)
        return [self.columns[place].values(row[place]) for row in self.rows]

    def values(self, key: str) -> list[Interval]:
        """Return the first number of each row in a column."""
        return [numbers[0] for numbers in self.numbers(key)]

    def means(self, key: str) -> list[float]:
        """Return the means of a column, without unknown ones."""
        return [one.mean for one in self.values(key) if not math.isnan(one.mean)]

    def named(self, key: str) -> dict[str, Interval]:
        """Return the values of a column by the first cell of their row."""
        names = (str(row[0]).strip("`") for row in self.rows)
        return dict(zip(names, self.values(key), strict=True))

    def markdown(self) -> str:
        """Return the table as Markdown, with intervals that do not break."""
        lines = [[one.head for one in self.columns], ["---"] * len(self.columns), *self.texts()]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return text.replace(" ± ", "\u00a0±\u00a0")
