"""Mooncake's fields with sessions, whose later turns have a ``delay`` (ai-dynamo/dynamo, #8998)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from hybridcache.lab.traces.formats.mooncake import MooncakeReader
from hybridcache.lab.traces.frame import Line, Notes, Record
from hybridcache.lab.traces.named import NAMES
from hybridcache.lab.traces.trace import TraceRequest


@dataclass(frozen=True, slots=True)
class MooncakeSessionsReader(MooncakeReader):
    """Sessions of a closed loop. Their first turns have a time, or begin with the trace; later ones
    have the milliseconds since the answer before, which takes no time. All requests are held."""

    word: ClassVar[str] = "mooncake-sessions"

    @staticmethod
    def recognises(record: Record) -> bool:
        return MooncakeReader.recognises(record) and record.first(NAMES["session"]) is not None

    def parser(self, notes: Notes) -> Callable[[Record], Iterator[TraceRequest]]:
        parse_timed, last = MooncakeReader.parser(self, notes), dict[str | int, float]()

        def parse(record: Record) -> Iterator[TraceRequest]:
            name = record.key(record.first(NAMES["session"]) or "session_id")
            if record.get("timestamp") is None:
                delay = record.seconds("delay") if "delay" in record or name in last else 0.0
                record = Record(record | {"timestamp": last.get(name, 0.0) + delay})
            for request in parse_timed(record):
                last[name] = record.seconds("timestamp")
                yield request._replace(service_s=0.0)

        return parse

    def ordered(self, found: Iterator[tuple[Line, TraceRequest]]) -> Iterator[TraceRequest]:
        return iter(sorted((one for _, one in found), key=lambda one: one.timestamp_s))
