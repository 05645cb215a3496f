"""Native trace format: JSON lines with every field of a ``TraceRequest``.

A first line ``{"format": "hybridcache", "version": 1, "unit": 1}`` is optional and sets the number
of tokens per id; ``counted_by`` there says how a text was converted to tokens. Then one object per
line, in order of time (small disorder is sorted, see ``base.in_order``):

- ``timestamp`` (or ``time``): seconds, or a date in ISO 8601; in all lines or in none: then one
  second between lines
- ``session``: string or number; default: unique to the line
- ``namespace``: string, number or null
- ``tokens``: the prompt's ids, or ``prefix``, [k, ids...]: the first k ids of the session's last
  prompt and answer, then these
- ``output``: the answer's ids; or ``output_length``: number of tokens in the answer, if its ids
  are unknown; both only if an id stands for several tokens
- ``boundaries``: ascending positions in ids
- ``partial``: tokens of the prompt's last id, if fewer than the unit
- ``answer_survives``: false if later prompts are known to leave this one before its end
- ``service``: seconds from the timestamp until the answer was complete
- ``stop_reason``: why the answer ended, as "tool_use" or "end_turn"
- ``session_end``: true: the client said that no further turn of the session will come

Other fields have no effect, and give one ``TraceFieldsWarning`` per file.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TextIO

import numpy as np

from hybridcache.lab.trace import (
    BadRecordError,
    BadRecords,
    FreshIds,
    Trace,
    TraceRequest,
    units,
)
from hybridcache.lab.traces.base import (
    FileReader,
    Record,
    TraceClock,
    TraceFieldsWarning,
    callers_level,
    in_order,
    json_lines,
    key,
    moment,
    read_ids,
    seconds,
    shown,
    text,
    whole,
)
from hybridcache.tokens import Tokens, common_prefix_len

TIMES = ("timestamp", "time")
FIELDS = frozenset(
    (
        *TIMES,
        "session",
        "namespace",
        "tokens",
        "prefix",
        "output",
        "output_length",
        "boundaries",
        "partial",
        "answer_survives",
        "service",
        "stop_reason",
        "session_end",
    )
)
"""Fields of a line that are read."""
TEXTS = frozenset(("request", "answer"))
"""Fields that ``engine record`` adds if it keeps the text. They are not read."""


@dataclass(frozen=True, slots=True)
class OwnReader(FileReader):
    """Reads files written by ``write`` or by a program of the user."""

    word: ClassVar[str] = "jsonl"

    @staticmethod
    def recognises(record: Record) -> bool:
        """Return whether the record is the format's header line, or has ``tokens`` or a
        ``prefix``."""
        has_tokens = isinstance(record.get("tokens"), list) or isinstance(
            record.get("prefix"), list
        )
        return record.get("format") == "hybridcache" or has_tokens

    @property
    def unit(self) -> int:
        """Tokens per id, from the header line, or 1 by default. Reads that line."""
        line, header = self._header()
        try:
            return whole(header, "unit", least=1) if "unit" in header else 1
        except ValueError as error:
            raise BadRecordError(f"{self.path}, line {line}: {error}") from error

    @property
    def counted_by(self) -> str:
        """Tokenizer of the texts, from the header line, or empty. Reads that line."""
        line, header = self._header()
        try:
            return text(header, "counted_by") if "counted_by" in header else ""
        except ValueError as error:
            raise BadRecordError(f"{self.path}, line {line}: {error}") from error

    def _header(self) -> tuple[int, Record]:
        """Return (line number, record) of the header line; an empty record if there is none."""
        line, record = next(iter(json_lines(self.path, BadRecords(skip=True))), (1, {}))
        return line, record if "format" in record else {}

    def __call__(self) -> Iterator[TraceRequest]:
        parser = _JsonlParser(self.unit, str(self.path))
        return in_order(self.path, json_lines(self.path, self.bad), parser.parse, self.bad)


class _JsonlParser:
    """Converts lines to requests. Keeps each session's last prompt and answer for ``prefix``."""

    def __init__(self, unit: int, path: str) -> None:
        self._unit = unit
        self._path = path
        self._has_warned = False
        self._fresh = FreshIds()
        self._number = -1
        self._clock = TraceClock()
        self._last: dict[Hashable, Tokens] = {}

    def parse(self, record: Record) -> Iterable[TraceRequest]:
        """Return the request of the line; none for the header line. Raises ValueError or KeyError,
        without any other effect, if the line is invalid."""
        if "format" in record:
            return
        self._number += 1
        if not self._has_warned and not record.keys() <= FIELDS:
            self._warn_of_unknown(record)
        _refuse_both(record, "tokens", "prefix")
        _refuse_both(record, *TIMES)
        session = key(record, "session") if "session" in record else f"line {self._number}"
        tokens = self._tokens(record, session)
        partial = record.get("partial")
        if partial is not None:
            partial = whole(record, "partial", 1, self._unit)
        time = next((name for name in TIMES if name in record), None)
        said_s = moment(record, time) if time else None
        output, answer = self._output(record)
        boundaries = tuple(read_ids(record.get("boundaries", [])).tolist())
        if any(position > len(tokens) for position in boundaries):
            raise ValueError(f"a boundary is outside of the prompt's {len(tokens)} ids")
        named = record.get("namespace") is not None
        survives, ends = record.get("answer_survives", True), record.get("session_end", False)
        for name, value in (("answer_survives", survives), ("session_end", ends)):
            if not isinstance(value, bool):
                raise ValueError(f"{name} is {shown(value)}: it must be true or false")
        now = self._clock.at(said_s)
        self._last[session] = np.concatenate((tokens, output))
        yield TraceRequest(
            now,
            session,
            key(record, "namespace") if named else None,
            tokens,
            output,
            tuple(sorted(boundaries)),
            partial,
            survives,
            answer,
            seconds(record, "service") if "service" in record else None,
            text(record, "stop_reason") if "stop_reason" in record else "",
            ends,
        )

    def _warn_of_unknown(self, record: Record) -> None:
        unknown = [name for name in record if name not in FIELDS and name not in TEXTS]
        if unknown:
            self._has_warned = True
            message = (
                f"{self._path}: unused fields: {', '.join(unknown)}; fields that are read: "
                f"{', '.join(sorted(FIELDS))}"
            )
            warnings.warn(TraceFieldsWarning(message), stacklevel=callers_level())

    def _tokens(self, record: Record, session: Hashable) -> Tokens:
        if "tokens" in record:
            tokens = read_ids(record["tokens"])
        elif "prefix" not in record:
            raise ValueError("tokens or prefix is missing")
        else:
            prefix = read_ids(record["prefix"])
            if not len(prefix):
                raise ValueError("prefix does not say how many ids are kept")
            before = self._last.get(session, np.zeros(0, np.int32))
            kept = int(prefix[0])
            if kept > len(before):
                raise ValueError(f"prefix keeps {kept} ids of {len(before)} that session has")
            tokens = np.concatenate((before[:kept], prefix[1:]))
        if not len(tokens):
            raise ValueError("the prompt is empty")
        return tokens

    def _output(self, record: Record) -> tuple[Tokens, int | None]:
        """Return (ids, number of tokens in the answer if the ids do not determine it, else
        None)."""
        if self._unit == 1:
            _refuse_both(record, "output", "output_length")
        several = self._unit > 1 and "output_length" in record
        if "output" in record:
            output = read_ids(record["output"])
            length = whole(record, "output_length") if several else None
            # An answer's first tokens may be part of the prompt's last id.
            if length is not None and units(length, self._unit) - len(output) not in (0, 1):
                raise ValueError(
                    f"output_length {length} is not that of {len(output)} ids of {self._unit} "
                    "tokens"
                )
            return output, length
        length = whole(record, "output_length") if "output_length" in record else 0
        return self._fresh.take(units(length, self._unit)), length if several else None


def _refuse_both(record: Record, first: str, second: str) -> None:
    if first in record and second in record:
        raise ValueError(f"it has both {first} and {second}: give one of them")


def write(trace: Trace, file: TextIO) -> int:
    """Write ``trace`` in this format and return the number of requests. Prompts that repeat their
    session are written as ``prefix``."""
    header: dict[str, Any] = {"format": "hybridcache", "version": 1, "unit": trace.unit}
    if trace.counted_by:
        header["counted_by"] = trace.counted_by
    file.write(json.dumps(header) + "\n")
    last: dict[Hashable, Tokens] = {}
    num_requests = 0
    for request in trace:
        num_requests += 1
        before = last.get(request.session)
        kept = 0 if before is None else common_prefix_len(before, request.tokens)
        record: dict[str, Any] = {"timestamp": round(request.timestamp_s, 6)}
        record["session"] = _plain(request.session)
        if request.namespace is not None:
            record["namespace"] = _plain(request.namespace)
        if kept:
            record["prefix"] = [kept, *request.tokens[kept:].tolist()]
        else:
            record["tokens"] = request.tokens.tolist()
        record["output"] = request.output.tolist()
        if trace.unit > 1 and request.answer_tokens is not None:
            record["output_length"] = request.answer_tokens
        if request.boundaries:
            record["boundaries"] = list(request.boundaries)
        if request.partial_tokens is not None:
            record["partial"] = request.partial_tokens
        if not request.answer_survives:
            record["answer_survives"] = False
        if request.service_s is not None:
            record["service"] = request.service_s
        if request.stop_reason:
            record["stop_reason"] = request.stop_reason
        if request.session_end:
            record["session_end"] = True
        file.write(json.dumps(record, separators=(",", ":")) + "\n")
        last[request.session] = np.concatenate((request.tokens, request.output))
    return num_requests


def _plain(value: Hashable) -> str | int:
    return value if isinstance(value, int | str) else str(value)
