"""Native trace format: JSON lines with every field of a ``TraceRequest``, in order of time.

``docs/reference/traces.md`` has the fields. A first line ``{"format": "hybridcache", "version": 1,
"unit": 1}`` is optional.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar, TextIO

import numpy as np

from hybridcache.lab.trace import (
    BadRecordError,
    BadRecords,
    FreshIds,
    Trace,
    TraceRequest,
    checked,
    plain_name,
    units,
)
from hybridcache.lab.traces.frame import FileReader, Notes, Record, TraceClock, json_lines
from hybridcache.tokens import Tokens, common_prefix_len

PLAIN: dict[str, tuple[str, Callable[[Record, str], Any]]] = {
    "namespace": ("namespace", Record.key),
    "partial": ("partial_tokens", Record.whole),
    "answer_survives": ("answer_survives", Record.flag),
    "service": ("service_s", Record.seconds),
    "stop_reason": ("stop_reason", Record.text),
}
"""Fields of a line that are a field of a request, with their types."""
OTHERS = {"timestamp", "session", "tokens", "prefix", "output", "output_length", "boundaries"}
TEXTS = {"request", "answer"}
"""Fields that ``engine record`` adds if it keeps the text. They are not read."""


@dataclass(frozen=True, slots=True)
class OwnReader(FileReader):
    """Reads files written by ``write_own`` or by a program of the user."""

    word: ClassVar[str] = "jsonl"

    @staticmethod
    def recognises(record: Record) -> bool:
        """Return whether the record is the header line, or has ``tokens`` or a ``prefix``."""
        ids = record.get("tokens"), record.get("prefix")
        return record.get("format") == "hybridcache" or any(isinstance(one, list) for one in ids)

    @property
    def unit(self) -> int:
        return self._header[0]

    @property
    def counted_by(self) -> str:
        return self._header[1]

    @property
    def _header(self) -> tuple[int, str]:
        """Return unit and tokenizer of the first line; (1, "") by default. Reads that line."""
        line, record = next(json_lines(self.path, BadRecords(skip=True)), (1, Record()))
        record = record if "format" in record else Record()
        try:
            record.optional(lambda name: record.whole(name, 1, 1), "version", 1)
            unit = record.optional(lambda name: record.whole(name, least=1), "unit", 1)
            return unit, record.optional(record.text, "counted_by", "")
        except ValueError as error:
            raise BadRecordError(f"{self.path}, line {line}: {error}") from error

    def records(self, bad: BadRecords) -> Iterator[tuple[int, Record]]:
        return (pair for pair in json_lines(self.path, bad) if "format" not in pair[1])

    def parser(self, notes: Notes) -> Callable[[Record], Iterator[TraceRequest]]:
        unit, fresh, clock, numbers = self.unit, FreshIds(), TraceClock(), count()
        last = dict[Hashable, Tokens]()
        """Last prompt and answer of each session, for ``prefix``."""

        def parse(record: Record) -> Iterator[TraceRequest]:
            number, known = next(numbers), PLAIN.keys() | OTHERS
            if unknown := ", ".join(name for name in record if name not in known | TEXTS):
                read = ", ".join(sorted(known))
                notes.count(f"with fields that are not read: {unknown}; known: {read}", "record")
            session = record.key("session") if "session" in record else f"unnamed {number}"
            tokens = _prompt(record, last.get(session, np.zeros(0, np.int32)))
            length = record.optional(record.whole, "output_length", None)
            if "output" in record:
                output = record.ids("output")
            else:
                output = fresh.take(units(length or 0, unit))
            boundaries = record.optional(record.ids, "boundaries", tokens[:0]).tolist()
            plain = {
                name: read(record, own)
                for own, (name, read) in PLAIN.items()
                if record.get(own) is not None
            }
            request = TraceRequest(0.0, session, None, tokens, output, tuple(boundaries))
            # With a unit of one, the ids of the answer tell its length.
            answer_tokens = length if unit > 1 else None
            request = checked(request._replace(answer_tokens=answer_tokens, **plain), unit)
            now_s = clock.at(record, "timestamp" if "timestamp" in record else None)
            last[session] = np.concatenate((tokens, output))
            yield request._replace(timestamp_s=now_s)

        return parse


def _prompt(record: Record, before: Tokens) -> Tokens:
    """Return the ids of a prompt; ``before`` are the session's last prompt and answer."""
    tokens = record.optional(record.ids, "tokens", before[:0])
    if "prefix" in record:
        if "tokens" in record:
            raise ValueError("it has both tokens and prefix: give one of them")
        prefix = record.ids("prefix")
        if not len(prefix) or prefix[0] > len(before):
            raise ValueError(
                f"prefix must begin with the number of ids to keep, at most {len(before)} here"
            )
        tokens = np.concatenate((before[: prefix[0]], prefix[1:]))
    if not len(tokens):
        missing = not {"tokens", "prefix"} & record.keys()
        raise ValueError("tokens or prefix is missing" if missing else "the prompt is empty")
    return tokens


def write_own(trace: Trace, file: TextIO) -> int:
    """Write ``trace`` as ``jsonl`` and return the number of requests. Prompts that repeat their
    session are written as ``prefix``."""
    header: dict[str, Any] = {"format": "hybridcache", "version": 1, "unit": trace.unit}
    if trace.counted_by:
        header["counted_by"] = trace.counted_by
    file.write(json.dumps(header) + "\n")
    last: dict[Hashable, Tokens] = {}
    num_requests = 0
    for request in trace:
        num_requests += 1
        session = plain_name(request.session)
        before = last.get(session)
        kept = 0 if before is None else common_prefix_len(before, request.tokens)
        ids = request.tokens[kept:].tolist()
        record = {
            "timestamp": round(request.timestamp_s, 6),
            "session": session,
            **({"prefix": [kept, *ids]} if kept else {"tokens": ids}),
            "output": request.output.tolist(),
        }
        if trace.unit > 1 and request.answer_tokens is not None:
            record["output_length"] = request.answer_tokens
        if request.boundaries:
            record["boundaries"] = list(request.boundaries)
        for name, (field, _) in PLAIN.items():
            value = getattr(request, field)
            if value != TraceRequest._field_defaults.get(field):
                record[name] = plain_name(value) if name == "namespace" else value
        file.write(json.dumps(record, separators=(",", ":"), default=np.generic.item) + "\n")
        last[session] = np.concatenate((request.tokens, request.output))
    return num_requests
