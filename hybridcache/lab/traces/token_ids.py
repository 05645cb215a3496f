"""Prompts as token ids in JSON lines, as benchmark tools write them.

The common names of each field are understood:

- prompt, a list of ids: ``input_tokens``, ``input_ids``, ``prompt_token_ids``, ``token_ids`` or
  ``prompt``
- answer, a list of ids: ``output_tokens``, ``output_ids``, ``output_token_ids`` or
  ``completion_token_ids``; or its length: ``num_output_tokens``, ``output_len``, ``output_length``
  or ``max_tokens``
- time in seconds: ``ts``, ``timestamp`` or ``arrival_time``; default: one second after the
  previous line
- session, a text or a whole number: ``session_id``, ``session`` or ``conversation_id``; default:
  unique to the line
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from hybridcache.lab.trace import FreshIds, TraceRequest
from hybridcache.lab.traces.base import (
    FileReader,
    Record,
    TraceClock,
    first_named,
    in_order,
    json_lines,
    key,
    read_ids,
    seconds,
    whole,
)

_PROMPT = ("input_tokens", "input_ids", "prompt_token_ids", "token_ids", "prompt")
_ANSWER = ("output_tokens", "output_ids", "output_token_ids", "completion_token_ids")
_ANSWER_LEN = ("num_output_tokens", "output_len", "output_length", "max_tokens")
_TIME = ("ts", "timestamp", "arrival_time")
_SESSION = ("session_id", "session", "conversation_id")


@dataclass(frozen=True, slots=True)
class TokenIdsReader(FileReader):
    """One request per line, in order."""

    word: ClassVar[str] = "token-ids"
    unit: int = 1

    @staticmethod
    def recognises(record: Record) -> bool:
        """Return whether the record has a list of ids under one of the prompt's names."""
        name = first_named(record, _PROMPT)
        return name is not None and isinstance(record[name], list)

    def __call__(self) -> Iterator[TraceRequest]:
        fresh = FreshIds()
        clock, number = TraceClock(), 0

        def parse(record: Record) -> Iterable[TraceRequest]:
            nonlocal number
            name = first_named(record, _PROMPT)
            prompt = read_ids(record[name] if name else [])
            if not len(prompt):
                raise ValueError(f"no list of ids under any of {', '.join(_PROMPT)}")
            answer, length = first_named(record, _ANSWER), first_named(record, _ANSWER_LEN)
            if answer is not None:
                output = read_ids(record[answer])
            else:
                output = fresh.take(whole(record, length) if length else 0)
            when, session = first_named(record, _TIME), first_named(record, _SESSION)
            number += 1
            owner = key(record, session) if session else number
            now = clock.at(seconds(record, when) if when else None)
            yield TraceRequest(now, owner, None, prompt, output)

        return in_order(self.path, json_lines(self.path, self.bad), parse, self.bad)
