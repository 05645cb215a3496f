"""Native trace format: JSON lines with every field of a ``TraceRequest``, in order of time.

``docs/reference/traces.md`` has the fields. A first line ``{"format": "hybridcache", "version": 1,
"unit": 1}`` is optional. Small disorder is sorted (see ``frame.in_order``). Fields without an
effect give one ``TraceFieldsWarning`` per file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hybridcache.lab.trace import BadRecordError, BadRecords, FreshIds, TraceRequest, units
from hybridcache.lab.traces.frame import FileReader, Record, TraceClock, json_lines, shown, warn
from hybridcache.lease import STOP_REASONS
from hybridcache.tokens import Tokens

FIELDS = frozenset(
    (
        *("timestamp", "time", "session", "namespace", "tokens", "prefix", "output"),
        *("output_length", "boundaries", "partial", "answer_survives", "service", "stop_reason"),
        "session_end",
    )
)
"""Fields of a line that are read."""
TEXTS = frozenset(("request", "answer"))
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
        """Tokenizer of the texts, or empty."""
        return self._header[1]

    @property
    def _header(self) -> tuple[int, str]:
        """Return unit and tokenizer of the first line; (1, "") by default. Reads that line."""
        line, record = next(json_lines(self.path, BadRecords(skip=True)), (1, Record()))
        record = record if "format" in record else Record()
        try:
            if record.get("version", 1) != 1:
                version = record["version"]
                raise ValueError(f"version is {version!r}, and this release reads version 1 only")
            unit = record.whole("unit", least=1) if "unit" in record else 1
            return unit, record.optional(record.text, "counted_by", "")
        except ValueError as error:
            raise BadRecordError(f"{self.path}, line {line}: {error}") from error

    def parser(self) -> Callable[[Record], Iterator[TraceRequest]]:
        unit, fresh, clock, number, has_warned = self.unit, FreshIds(), TraceClock(), -1, False
        last: dict[str | int, Tokens] = {}
        """Last prompt and answer of each session, for ``prefix``."""

        def parse(record: Record) -> Iterator[TraceRequest]:
            nonlocal number, has_warned
            if "format" in record:
                return
            number += 1
            unknown = record.keys() - FIELDS - TEXTS
            if unknown and not has_warned:
                has_warned = True
                names = ", ".join(name for name in record if name in unknown)
                known = ", ".join(sorted(FIELDS))
                warn(f"{self.path}: unused fields: {names}; fields that are read: {known}")
            both = [("tokens", "prefix"), ("timestamp", "time")]
            for one, other in both + [("output", "output_length")] * (unit == 1):
                if one in record and other in record:
                    raise ValueError(f"it has both {one} and {other}: give one of them")
            session = record.key("session") if "session" in record else f"line {number}"
            tokens = _prompt(record, last.get(session, np.zeros(0, np.int32)))
            boundaries = record.optional(record.ids, "boundaries", tokens[:0]).tolist()
            if boundaries and max(boundaries) > len(tokens):
                raise ValueError(f"boundaries is outside of the prompt's {len(tokens)} ids")
            partial = record.whole("partial", 1, unit) if record.first(("partial",)) else None
            output, answer = _answer(record, unit, fresh)
            field = "time" if "time" in record else "timestamp"
            time = record.optional(record.moment, field, None)
            stop_reason = record.optional(record.text, "stop_reason", "")
            if stop_reason and stop_reason not in STOP_REASONS:
                known = ", ".join(sorted(STOP_REASONS))
                raise ValueError(f"stop_reason is {shown(stop_reason)}, not one of {known}")
            request = TraceRequest(
                0.0,
                session,
                record.key("namespace") if record.get("namespace") is not None else None,
                tokens,
                output,
                tuple(sorted(boundaries)),
                partial,
                record.optional(record.flag, "answer_survives", True),
                answer,
                record.optional(record.seconds, "service", None),
                stop_reason,
                record.optional(record.flag, "session_end", False),
            )
            now_s = clock.at(time, isinstance(record.get(field), str))
            last[session] = np.concatenate((tokens, output))
            yield request._replace(timestamp_s=now_s)

        return parse


def _prompt(record: Record, before: Tokens) -> Tokens:
    """Return the ids of a prompt; ``before`` are the session's last prompt and answer."""
    if "prefix" in record:
        prefix = record.ids("prefix")
        if not len(prefix) or prefix[0] > len(before):
            raise ValueError(
                f"prefix must begin with the number of ids to keep, at most {len(before)} here"
            )
        tokens = np.concatenate((before[: prefix[0]], prefix[1:]))
    elif "tokens" in record:
        tokens = record.ids("tokens")
    else:
        raise ValueError("tokens or prefix is missing")
    if not len(tokens):
        raise ValueError("the prompt is empty")
    return tokens


def _answer(record: Record, unit: int, fresh: FreshIds) -> tuple[Tokens, int | None]:
    """Return (ids, number of tokens in the answer if the ids do not determine it, else None)."""
    length = record.whole("output_length") if "output_length" in record else None
    several = length if unit > 1 else None
    if "output" not in record:
        return fresh.take(units(length or 0, unit)), several
    output = record.ids("output")
    # An answer's first tokens may be part of the prompt's last id.
    if several is not None and units(several, unit) - len(output) not in (0, 1):
        raise ValueError(
            f"output_length {several} is not that of {len(output)} ids of {unit} tokens"
        )
    return output, several
