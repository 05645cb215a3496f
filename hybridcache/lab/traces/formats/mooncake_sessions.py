"""Mooncake's fields with sessions, whose later turns have a ``delay`` (ai-dynamo/dynamo, #8998)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from hybridcache.lab.traces.formats.mooncake import MooncakeReader
from hybridcache.lab.traces.frame import TIMES, FileReader, Line, Notes, Record
from hybridcache.lab.traces.named import NAMES
from hybridcache.lab.traces.trace import TraceRequest


@dataclass(frozen=True, slots=True)
class MooncakeSessionsReader(MooncakeReader):
    """Sessions of a closed loop. Their first turns have a time, or begin with the trace; later ones
    have the ``delay`` since the answer before, which takes no time. All requests are held."""

    word: ClassVar[str] = "mooncake-sessions"

    @staticmethod
    def recognises(record: Record) -> bool:
        return MooncakeReader.recognises(record) and record.first(NAMES["session"]) is not None

    def times_of(self, record: Record) -> Iterable[tuple[str, object]]:
        untimed = record.first(TIMES) is None and "delay" in record
        return [("delay", record.number("delay"))] if untimed else FileReader.times_of(self, record)

    def facts(self, record: Record) -> dict[str, Any]:
        return {"service_s": 0.0}

    def clock(self, notes: Notes) -> Callable[[Record], float]:
        timed, per_s = FileReader.clock(self, notes), self.time_unit().per_s
        last = dict[Hashable, float]()

        def when_s(record: Record) -> float:
            name = record.key(record.first(NAMES["session"]) or "session_id")
            if record.first(TIMES) is None:
                is_first = "delay" not in record and name not in last
                delay = 0.0 if is_first else record.seconds("delay")
                notes.count("without a time: they begin with the trace", "session", is_first)
                last[name] = last.get(name, 0.0) + delay / per_s
            else:
                last[name] = timed(record)
            return last[name]

        return when_s

    def ordered(self, found: Iterator[tuple[Line, TraceRequest]]) -> Iterator[TraceRequest]:
        return iter(sorted((one for _, one in found), key=lambda one: one.timestamp_s))
