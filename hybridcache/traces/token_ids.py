"""Prompts as token ids in JSON lines, as benchmark tools write them; the common spellings of each field are understood.

========  =================================================================================================
prompt    ``input_tokens``, ``input_ids``, ``prompt_token_ids``, ``token_ids``, ``prompt``: a list of ids
answer    ``output_tokens``, ``output_ids``, ``output_token_ids``, ``completion_token_ids``: a list of ids, or
          ``num_output_tokens``, ``output_len``, ``output_length``, ``max_tokens``: its length
time      ``ts``, ``timestamp``, ``arrival_time``: seconds; default: one second after the line before
session   ``session_id``, ``session``, ``conversation_id``; default: the line's own
========  =================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from hybridcache.trace import BadRecords, FreshIds, TraceRequest
from hybridcache.traces.base import Record, json_lines, parsed, read_ids

_PROMPT = ("input_tokens", "input_ids", "prompt_token_ids", "token_ids", "prompt")
_ANSWER = ("output_tokens", "output_ids", "output_token_ids", "completion_token_ids")
_ANSWER_LEN = ("num_output_tokens", "output_len", "output_length", "max_tokens")
_TIME = ("ts", "timestamp", "arrival_time")
_SESSION = ("session_id", "session", "conversation_id")


@dataclass(frozen=True, slots=True)
class TokenIdsReader:
    """One request a line, in order."""

    word: ClassVar[str] = "token-ids"
    path: Path
    bad: BadRecords = field(default_factory=lambda: BadRecords(skip=False))
    unit: int = 1

    @staticmethod
    def recognises(record: Record) -> bool:
        return isinstance(_first(record, _PROMPT), list)

    def __call__(self) -> Iterator[TraceRequest]:
        fresh = FreshIds()
        now, number = -1.0, 0

        def parse(record: Record) -> Iterable[TraceRequest]:
            nonlocal now, number
            prompt = read_ids(_first(record, _PROMPT) or [])
            if not len(prompt):
                raise ValueError(f"no list of ids under any of {', '.join(_PROMPT)}")
            answer = _first(record, _ANSWER)
            if isinstance(answer, list):
                output = read_ids(answer)
            else:
                output = fresh.take(int(_first(record, _ANSWER_LEN) or 0))
            when = _first(record, _TIME)
            now = now + 1.0 if when is None else float(when)
            number += 1
            session = _first(record, _SESSION)
            yield TraceRequest(now, number if session is None else session, None, prompt, output)

        return parsed(self.path, json_lines(self.path, self.bad), parse, self.bad)


def _first(record: Record, names: Sequence[str]) -> Any:
    """The value of the first of ``names`` that the record has."""
    return next((record[name] for name in names if name in record), None)
