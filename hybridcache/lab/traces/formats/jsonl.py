"""Native trace format: JSON lines with every field of a ``TraceRequest``, in order of time, after a
first line ``{"format": "hybridcache", "version": 1, "unit": 1}``, which is optional."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hybridcache.lab.traces.frame import FileReader, Notes, Record, TimeUnit
from hybridcache.lab.traces.own import FIELDS, READ, header_of, usual
from hybridcache.lab.traces.trace import FreshIds, TraceRequest, checked, units
from hybridcache.radix.tokens import Tokens


@dataclass(frozen=True, slots=True)
class OwnReader(FileReader):
    """Files written by ``write_own`` or by a program of the user."""

    word: ClassVar[str] = "jsonl"
    usual_times: ClassVar[str] = "s"

    @staticmethod
    def recognises(record: Record) -> bool:
        """Return whether the record is the header line, or has ``tokens`` or a ``prefix``."""
        own = record if {"messages", "prompt"} & record.keys() else usual(record)
        ids = own.get("tokens"), own.get("prefix")
        return record.get("format") == "hybridcache" or any(isinstance(one, list) for one in ids)

    @staticmethod
    def is_left_out(record: Record) -> bool:
        return "format" in record

    @property
    def unit(self) -> int:
        return header_of(self.path)[0]

    def time_unit(self) -> TimeUnit:
        if not self.times and header_of(self.path)[2]:
            return TimeUnit("s", "as our own format has them")
        return FileReader.time_unit(self)

    @property
    def counted_by(self) -> str:
        return header_of(self.path)[1]

    def parser(self, notes: Notes) -> Callable[[Record], Iterator[TraceRequest]]:
        unit, fresh, clock = self.unit, FreshIds(), self.clock(notes)
        last = dict[Hashable, Tokens]()
        """Last prompt and answer of each session, for ``prefix``."""

        def parse(record: Record) -> Iterator[TraceRequest]:
            record = usual(record)
            if unread := ", ".join(name for name in record if name not in READ):
                notes.count(f"with fields that are not read: {unread}", "record")
            values: dict[str, Any] = {"namespace": None}
            for name, (field, read) in FIELDS.items():
                if record.get(name) is not None:
                    values[field] = read(record, name)
            if "session" not in values:
                values["session"] = notes.unnamed()
            tokens = _prompt(record, last.get(values["session"], np.zeros(0, np.int32)))
            if "output" not in values:
                length = record.optional(record.whole, "output_length", 0, notes)
                values["output"] = fresh.take(units(length, unit))
            if unit == 1:  # the ids of the answer tell its length
                values.pop("answer_tokens", None)
            request = checked(TraceRequest(0.0, tokens=tokens, **values), unit)
            now_s = clock(record)
            last[request.session] = np.concatenate((tokens, request.output))
            yield request._replace(timestamp_s=now_s)

        return parse


def _prompt(record: Record, before: Tokens) -> Tokens:
    """Return the ids of a prompt; ``before`` are the session's last prompt and answer."""
    if "prefix" not in record:
        return record.ids("tokens")
    if "tokens" in record:
        raise ValueError("it has both tokens and prefix: give one of them")
    prefix = record.ids("prefix")
    if not len(prefix) or prefix[0] > len(before):
        raise ValueError(
            f"prefix must begin with the number of ids to keep, at most {len(before)} here"
        )
    return np.concatenate((before[: prefix[0]], prefix[1:]))
