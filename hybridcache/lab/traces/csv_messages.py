"""Comma-separated values of the fields that ``messages.py`` reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from hybridcache.lab.trace import BadRecords
from hybridcache.lab.traces.frame import COUNTS_ALONE, Record, csv_lines
from hybridcache.lab.traces.messages import MessagesReader
from hybridcache.lab.traces.prompts import Named


@dataclass(frozen=True, slots=True)
class CsvReader(MessagesReader):
    """Comma-separated values, a request or a message per row."""

    word: ClassVar[str] = "csv"
    is_csv: ClassVar[bool] = True

    def records(self, bad: BadRecords) -> Iterator[tuple[int, Record]]:
        """Yield (line, row). Empty fields are None."""
        for line, row in csv_lines(self.path, bad):
            yield line, Record((name, value or None) for name, value in row.items())

    @property
    def first(self) -> Record:
        """First row with a text; the first row if there is none."""
        rows = [row for _, row in islice(self.records(BadRecords(skip=True)), 1)]
        texts = {self.prompt or "prompt", "messages", "content"}
        filled = (row for _, row in self.records(BadRecords(skip=True)) if row.first(texts))
        return next(filled, rows[0] if rows else Record())

    def check(self, first: Named) -> None:
        """Raise ValueError if all prompts are empty, or whole numbers, which are counts of
        tokens."""
        name, prompt = first.used.get("prompt"), first.get("prompt")
        empty = {self.prompt, "prompt", "messages"} & first.record.keys()
        if empty and not first.used.keys() & {"prompt", "messages", "content"}:
            raise ValueError(f"column {min(empty)!r} is empty in all rows")
        if name is None or "messages" in first.used or not prompt.strip().isdecimal():
            return
        texts = (row.get(name) for _, row in self.records(BadRecords(skip=True)))
        if all(one.strip().isdecimal() for one in texts if one):
            raise ValueError(
                f"all prompts in column {name!r} are whole numbers, as {prompt!r}. {COUNTS_ALONE}"
            )
