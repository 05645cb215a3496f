"""Hashes of blocks in the request log of Dynamo (ai-dynamo/dynamo, ``dynamo.request.trace.v1``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from hybridcache.lab.traces.formats.counts import COUNTS
from hybridcache.lab.traces.formats.mooncake import MooncakeReader
from hybridcache.lab.traces.frame import FileReader, Record, Records, warn
from hybridcache.lab.traces.named import NAMES
from hybridcache.lab.traces.trace import BadRecords, units

BLOCKS = (16, 32, 64, 128, 256, 512, 1024, 8, 4, 2, 1)
"""Sizes of a block that are tried if the log names none."""


@dataclass(frozen=True, slots=True)
class DynamoReader(MooncakeReader):
    """Ends of requests in the log of Dynamo's frontend. Other events are left out."""

    word: ClassVar[str] = "dynamo"
    hashes: ClassVar[str] = "input_sequence_hashes"
    unit: int = 0
    """Tokens of a block; 0 for those that the first request names."""

    def __post_init__(self) -> None:
        rows = (Record(one) for _, one in self.records(BadRecords(skip=True)))
        first = next((one for one in rows if self.hashes in one and not self.unit), Record())
        length = first.optional(first.whole, "input_length", 0)
        number = len(first.optional(first.values_of, self.hashes, []))
        likely = (one for one in BLOCKS if number in (length // one, units(length, one)))
        size = first.optional(first.whole, "trace_block_size", 0)
        if first and not size:
            size = next(likely, BLOCKS[0])
            warn(f"{self.path}: no trace_block_size: {size} tokens are assumed; ?unit=N sets it")
        object.__setattr__(self, "unit", self.unit or size or BLOCKS[0])

    @staticmethod
    def recognises(record: Record) -> bool:
        found = flat(record)
        return DynamoReader.hashes in found or str(found.get("schema")).startswith("dynamo.")

    @staticmethod
    def is_left_out(record: Record) -> bool:
        return record.get("event_type", "request_end") != "request_end"

    def records(self, bad: BadRecords) -> Records:
        return ((line, flat(Record(one))) for line, one in FileReader.records(self, bad))

    def facts(self, record: Record) -> dict[str, Any]:
        name, model = record.first(("total_time_ms",)), record.get("model")
        found = {"service_s": record.seconds(name) / 1000} if name else {}
        return found | {"namespace": model if isinstance(model, str) else None}


def flat(record: Record) -> Record:
    """Return a row of Dynamo's log with the fields of the objects in it, and Mooncake's names of
    the lengths."""
    for name in ("event", "request", "replay", "agent_context"):
        if isinstance(inner := record.get(name), dict):
            record = Record(inner if name == "event" else record | inner)
    names = ("input_length", COUNTS), ("output_length", NAMES["length"])
    pairs = ((usual, record.first(known)) for usual, known in names)
    return Record({usual: record[name] for usual, name in pairs if name} | record)
