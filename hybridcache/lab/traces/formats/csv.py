"""Values with commas, semicolons or tabs between: a request or a message in each row, under a line
of names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hybridcache.lab.traces.formats.messages import MessagesReader
from hybridcache.lab.traces.frame import Records, csv_records
from hybridcache.lab.traces.trace import BadRecords


@dataclass(frozen=True, slots=True)
class CsvReader(MessagesReader):
    """The fields of ``messages`` as columns. An empty field is None."""

    word: ClassVar[str] = "csv"

    def records(self, bad: BadRecords) -> Records:
        return csv_records(self.path, bad)
