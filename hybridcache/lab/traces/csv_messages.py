"""Comma-separated values of the fields that ``messages.py`` reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from hybridcache.lab.trace import BadRecords
from hybridcache.lab.traces.frame import Record, csv_lines
from hybridcache.lab.traces.messages import MessagesReader


@dataclass(frozen=True, slots=True)
class CsvReader(MessagesReader):
    """Comma-separated values, a request or a message per row."""

    word: ClassVar[str] = "csv"
    is_csv: ClassVar[bool] = True

    def records(self, bad: BadRecords) -> Iterator[tuple[int, Record]]:
        """Yield (line, row). Empty fields are None."""
        for line, row in csv_lines(self.path, bad):
            yield line, Record((name, value or None) for name, value in row.items())
