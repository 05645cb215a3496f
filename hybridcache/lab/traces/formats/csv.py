"""Comma-separated values: a request or a single message in each row, under a line of names."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hybridcache.lab.trace import BadRecords
from hybridcache.lab.traces.formats.messages import MessagesReader
from hybridcache.lab.traces.frame import DAMAGE, DAMAGED, LONGEST, Records, head_of, open_bytes


@dataclass(frozen=True, slots=True)
class CsvReader(MessagesReader):
    """The fields of ``messages`` as columns. An empty field is None."""

    word: ClassVar[str] = "csv"

    def records(self, bad: BadRecords) -> Records:
        """Yield (line, row). Rows of another length, or with an open quote, are reported."""
        csv.field_size_limit(LONGEST)  # of the whole process: 128 KiB of text are its default
        with open_bytes(self.path) as file:
            rows = csv.reader((line.decode() for line in file), strict=True)
            names: list[str] = []
            while True:
                line = rows.line_num + 1
                try:
                    row = next(rows, None)
                except DAMAGED as error:
                    bad.report(self.path, line, DAMAGE.format(error))
                    return
                except csv.Error as error:
                    problem = f"not comma-separated values ({error}), up to line {rows.line_num}"
                    bad.report(self.path, line, problem)
                    continue
                if row is None:
                    return
                if not names:
                    names = row
                elif row and len(row) != len(names):
                    bad.report(self.path, line, f"{len(row)} fields under {len(names)} names")
                elif row:
                    fields = zip(names, row, strict=True)
                    yield line, {name: value or None for name, value in fields if name}


def is_csv(path: Path) -> bool:
    """Return whether a file begins with a line of names, or has the ending of CSV and no JSON."""
    head = head_of(path)
    names = rb',*("?[A-Za-z][^{}\[\]:]*[,;\t][^{}\[\]:]*|prompt)'
    has_names = re.fullmatch(names, head.partition(b"\n")[0].strip()) is not None
    return has_names or (".csv" in path.suffixes and head[:1] not in b"{[")
