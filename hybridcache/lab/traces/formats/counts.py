"""Logs of numbers of tokens without texts: JSON lines or CSV, a request in each row. A prompt is
taken to continue the prompt and answer before it in its session; sessions share ``system`` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hybridcache.lab.traces.formats.messages import FAILED
from hybridcache.lab.traces.frame import Notes, Record
from hybridcache.lab.traces.named import NAMES, Named, NamedTimes
from hybridcache.lab.traces.trace import FreshIds, KnownIds, TraceRequest
from hybridcache.radix.tokens import Tokens

COUNTS = ("prompt_tokens", "input_tokens", "num_prompt_tokens", "input_length")
EMPTY, OTHER = "of no prompt tokens left out", "of other values than those of ?where= left out"


@dataclass(frozen=True, slots=True)
class CountsReader(NamedTimes):
    """Rows with a number of prompt tokens and a session."""

    word: ClassVar[str] = "counts"
    limits: ClassVar[str] = "tokens that sessions share, system prompts too: {0.system} (?system=N)"
    where: str = ""
    """Rows to read, as ``column:value``, joined by commas."""
    system: int = 0

    @staticmethod
    def recognises(record: Record) -> bool:
        named = Named(record, {})
        has_session = bool(named.record.keys() & {*NAMES["session"]})  # It may be empty in a row.
        return has_session and not named.has_prompt and named.record.first(COUNTS) is not None

    def parser(self, notes: Notes) -> Callable[[Record], Iterator[TraceRequest]]:
        clock, known, fresh = self.clock(notes), KnownIds(), FreshIds()
        head = np.arange(known.reserve(self.system), self.system, dtype=np.int32)
        last = dict[object, Tokens]()
        wanted = dict(one.split(":", 1) for one in self.where.split(",") if ":" in one)

        def parse(raw: Record) -> Iterator[TraceRequest]:
            record = Named(raw, self.names)
            row, name = record.record, self.prompt or raw.first(COUNTS) or COUNTS[0]
            is_other = any(str(raw[column]) != value for column, value in wanted.items())
            if is_other or record.has_failed or row.number(name) in (None, 0):
                notes.count(OTHER if is_other else FAILED if record.has_failed else EMPTY, "row")
                return
            session = record.key("session") if "session" in record else notes.unnamed()
            namespace = record.namespace()
            before = last.get((namespace, session), head)
            length, answer = row.whole(name, 1), record.answer_length(notes)
            first = known.reserve(added := max(0, length - len(before)))
            new = np.arange(first, first + added, dtype=np.int32)
            output = fresh.take(answer)
            tokens, now_s = np.concatenate((before[:length], new)), clock(record)
            last[namespace, session] = np.concatenate((tokens, output))
            yield TraceRequest(now_s, session, namespace, tokens, output)

        return parse

    def describe(self) -> str:
        """Return the columns that are read. ValueError if one is missing."""
        merged = self.first_fields()
        name, used = self.prompt or merged.first(COUNTS), self.named(merged).used if merged else {}
        if merged and (name not in merged or "session" not in used):
            fault = f"no column of prompt tokens or sessions; it has {', '.join(merged)}"
            raise ValueError(f"{self.path}: {fault}: add ?prompt=COLUMN&session=COLUMN")
        pairs = ", ".join(f"{field}={one}" for field, one in used.items())
        read = {name, *used.values(), *(one.partition(":")[0] for one in self.where.split(","))}
        rest = ", ".join(one for one in merged if one not in read)
        unread = f"; not read: {rest}" * bool(rest)
        return (
            f"prompt={name}, {pairs} (a prompt continues the one before it in its session){unread}"
        )
