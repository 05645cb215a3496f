"""Mooncake's published traces: hashes of 512-token blocks (FAST'25, kvcache-ai/Mooncake,
FAST25-release/traces).

``hash_ids`` names every block of the prompt, the last, partial one included; answers are lengths
only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from hybridcache.lab.trace import (
    BadRecords,
    FreshIds,
    TraceRequest,
    units,
)
from hybridcache.lab.traces.base import (
    Clock,
    Reader,
    Record,
    json_lines,
    parsed,
    read_ids,
    seconds,
    whole,
)


@dataclass(frozen=True, slots=True)
class MooncakeReader(Reader):
    """``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids``. Every request is its
    own session."""

    word: ClassVar[str] = "mooncake"
    path: Path
    bad: BadRecords = field(default_factory=lambda: BadRecords(skip=False))
    unit: int = 512

    @staticmethod
    def recognises(record: Record) -> bool:
        """``hash_ids`` and an ``input_length``."""
        return "hash_ids" in record and "input_length" in record

    def __call__(self) -> Iterator[TraceRequest]:
        fresh, clock = FreshIds(), Clock()
        number = 0

        def parse(record: Record) -> Iterable[TraceRequest]:
            nonlocal number
            said_s = seconds(record, "timestamp") / 1000
            length = whole(record, "input_length", least=1)
            tokens = read_ids(record["hash_ids"])
            if len(tokens) != units(length, self.unit):
                raise ValueError(
                    f"{len(tokens)} hash_ids do not cover input_length {length} in blocks of "
                    f"{self.unit} tokens; "
                    "say their size with ?unit="
                )
            # The answer fills the prompt's partial block first.
            total = units(length + whole(record, "output_length"), self.unit)
            output = fresh.take(total - len(tokens))
            partial = length - (len(tokens) - 1) * self.unit
            number += 1
            when = clock.at(said_s)
            yield TraceRequest(when, number, None, tokens, output, (), partial)

        return parsed(self.path, json_lines(self.path, self.bad), parse, self.bad)
