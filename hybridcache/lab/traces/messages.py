"""Requests as texts, in the tokens of a named tokenizer: JSON lines, or comma-separated values.

The records are those of ``prompts.py``. Times count from the first request. Without a session, a
prompt continues the session whose last prompt it begins with. Fields that are not read are named,
with counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from hybridcache.geometry.units import counted
from hybridcache.lab.trace import BadRecords, TraceRequest
from hybridcache.lab.traces.frame import (
    COUNTS_ALONE,
    FileReader,
    Record,
    csv_lines,
    in_order,
    warn,
)
from hybridcache.lab.traces.prompts import Named, PromptParser
from hybridcache.lab.traces.text import load_chat_text

ABSENT = {
    "time": "one second between records",
    "session": "prompts that continue another",
    "answer": "unknown",
}
"""Rules for fields that are absent."""


@dataclass(frozen=True, slots=True)
class MessagesReader(FileReader):
    """JSON lines of requests, or of single messages."""

    word: ClassVar[str] = "messages"
    tokenizer: str = ""
    template: str = "chatml"
    prompt: str = ""
    """Name of the field of prompts in a file with other names; so are the next five."""
    time: str = ""
    session: str = ""
    answer: str = ""
    length: str = ""
    tenant: str = ""
    """Name of the field of tenants. Prompts of different tenants share no prefix."""

    @staticmethod
    def recognises(record: Record) -> bool:
        """Return whether the record has messages, a prompt, or a role with a content."""
        named = Named(record, {})
        return named.is_request or (named.is_message and "content" in named.used)

    def __call__(self) -> Iterator[TraceRequest]:
        parser = PromptParser(load_chat_text(self.tokenizer, self.template), self._names)
        began_s: float | None = None
        for request in in_order(self.path, self.records(self.bad), parser.parse, self.bad):
            began_s = request.timestamp_s if began_s is None else began_s
            yield request._replace(timestamp_s=request.timestamp_s - began_s)
        problems = list(parser.usage.problems(f"{self.word}:{self.path}"))
        if unanswered := parser.num_unanswered():
            problems.insert(0, f"{unanswered:,} messages without an answer are no requests")
        if parser.num_failed:
            failed = counted(parser.num_failed, "record")
            problems.insert(0, f"{failed} of failed requests left out (status 400 or more)")
        if problems:
            warn(f"{self.path}: {'; '.join(problems)}")

    @property
    def _names(self) -> dict[str, str]:
        fields = ("prompt", "time", "session", "answer", "length", "tenant")
        return {name: getattr(self, name) for name in fields}

    def describe(self) -> str:
        """Return the names that are read for each field in the first record.

        Raises ValueError if there is nothing to read, or if all prompts of a CSV file are whole
        numbers.
        """
        records = self.records(BadRecords(skip=True))
        first = next(records, (0, None))[1]
        if first is None:
            return ""
        try:
            named = Named(first, self._names)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        if not named.is_request and "content" not in named.used:
            raise ValueError(
                f"{self.path}: there is no column prompt or messages ({', '.join(first)}): name "
                f"it as in {self.word}:{self.path}?prompt=COLUMN. {COUNTS_ALONE}"
            )
        found = [f"{name}={column}" for name, column in named.used.items()]
        if named.is_message:
            return f"{', '.join(found)} (an answer is a request after all messages of its session)"
        prompt = named.get("prompt")
        if self.is_csv and prompt and "messages" not in named.used:
            texts = (row.get(named.used["prompt"]) for _, row in records)
            if prompt.strip().isdecimal() and all(one.strip().isdecimal() for one in texts if one):
                raise ValueError(
                    f"{self.path}: all prompts in column {named.used['prompt']!r} are whole "
                    f"numbers, as {prompt!r}. {COUNTS_ALONE}"
                )
        missing = ABSENT.keys() - named.used.keys()
        missing -= {"answer"} if "length" in named.used else set()
        found += [f"{name}=none ({rule})" for name, rule in ABSENT.items() if name in missing]
        return ", ".join(found)


@dataclass(frozen=True, slots=True)
class CsvReader(MessagesReader):
    """Comma-separated values, a request or a message per row."""

    word: ClassVar[str] = "csv"
    is_csv: ClassVar[bool] = True

    def records(self, bad: BadRecords) -> Iterator[tuple[int, Record]]:
        """Yield (line, row). Empty fields are None."""
        for line, row in csv_lines(self.path, bad):
            yield line, Record((name, value or None) for name, value in row.items())
