"""Requests as texts, in the tokens of a named tokenizer: JSON lines.

The records are those of ``prompts.py``. Times count from the first request. Without a session, a
prompt continues the session whose last prompt it begins with. Fields that are not read are named,
with counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from hybridcache.lab.trace import BadRecords, TraceRequest
from hybridcache.lab.traces.frame import ONE_SECOND, FileReader, Record, from_first, in_order, warn
from hybridcache.lab.traces.prompts import Named, PromptParser
from hybridcache.lab.traces.text import load_chat_text


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
        return named.is_request or (named.is_message and "content" in named.record)

    def __call__(self) -> Iterator[TraceRequest]:
        parser = PromptParser(load_chat_text(self.tokenizer, self.template), self._names)
        yield from from_first(in_order(self.path, self.records(self.bad), parser.parse, self.bad))
        if problems := "; ".join(parser.problems(f"{self.word}:{self.path}")):
            warn(f"{self.path}: {problems}")

    @property
    def first(self) -> Record:
        """Fields of the first hundred records, each with its first value."""
        merged = Record()
        for _, record in islice(self.records(BadRecords(skip=True)), 100):
            missing = (name for name in record if merged.get(name) is None)
            merged |= {name: record[name] for name in missing}
        return merged

    @property
    def _names(self) -> dict[str, str]:
        fields = ("prompt", "time", "session", "answer", "length", "tenant")
        return {name: getattr(self, name) for name in fields}

    @property
    def invented_times(self) -> str:
        has_time = not self.first or "time" in Named(self.first, self._names).used
        return "" if has_time else ONE_SECOND

    def describe(self) -> str:
        """Return the names that are read for each field in the first records. ValueError if there
        is nothing to read."""
        first = self.first
        if not first:
            return ""
        try:
            return Named(first, self._names).describe(f"{self.word}:{self.path}")
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
