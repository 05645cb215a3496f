"""Mooncake's published traces: hashes of 512-token blocks (FAST'25, kvcache-ai/Mooncake, FAST25-release/traces).

``hash_ids`` names every block of the prompt, the last, partial one included; answers are lengths only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from hybridcache.trace import BadRecords, FreshIds, TraceRequest, units
from hybridcache.traces.base import Record, json_lines, parsed, read_ids


@dataclass(frozen=True, slots=True)
class MooncakeReader:
    """``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids``. Every request is its own session."""

    word: ClassVar[str] = "mooncake"
    path: Path
    bad: BadRecords = field(default_factory=lambda: BadRecords(skip=False))
    unit: int = 512

    @staticmethod
    def recognises(record: Record) -> bool:
        return "hash_ids" in record and "input_length" in record

    def __call__(self) -> Iterator[TraceRequest]:
        fresh = FreshIds()
        number = 0

        def parse(record: Record) -> Iterable[TraceRequest]:
            nonlocal number
            length = int(record["input_length"])
            tokens = read_ids(record["hash_ids"])
            if length < 1 or len(tokens) != units(length, self.unit):
                raise ValueError(f"{len(tokens)} hash_ids do not cover input_length {length}")
            # The answer fills the prompt's partial block first.
            total = units(length + int(record["output_length"]), self.unit)
            output = fresh.take(total - len(tokens))
            when = float(record["timestamp"]) / 1000
            partial = length - (len(tokens) - 1) * self.unit
            number += 1
            yield TraceRequest(when, number, None, tokens, output, (), partial)

        return parsed(self.path, json_lines(self.path, self.bad), parse, self.bad)
