"""ShareGPT: an array of ``{"id": "abc_0", "conversations": [{"from": "human", "value": "..."}]}``.

A record is a segment: its id ends in the index of its first message. Segments of one conversation
follow each other, and the message at the border is often in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice, pairwise
from typing import ClassVar

from hybridcache.lab.arrivals import Pauses
from hybridcache.lab.trace import BadRecords, TraceRequest
from hybridcache.lab.traces.dialects import Chat
from hybridcache.lab.traces.frame import Line, Record, SessionReader, json_array, parsed
from hybridcache.lab.traces.text import load_chat_text

_ROLES = {"human": "user", "user": "user", "system": "system"}


@dataclass(frozen=True, slots=True)
class ShareGPTReader(SessionReader):
    """Conversations of people. Every answer that follows a question is a request; a conversation
    ends at ``cap`` tokens."""

    word: ClassVar[str] = "sharegpt"
    tokenizer: str = "qwen3.5"
    template: str = "chatml"
    """The answers hold no thoughts, so the plain template is the default."""
    cap: int = 8192
    pauses: Pauses = field(default_factory=Pauses)
    limit: int | None = None
    """Number of conversations to read, or None for all."""

    @staticmethod
    def recognises(record: Record) -> bool:
        return "conversations" in record

    def records(self, bad: BadRecords) -> Iterator[tuple[Line, Record]]:
        return islice(self._whole(bad), self.limit)

    def _whole(self, bad: BadRecords) -> Iterator[tuple[Line, Record]]:
        """Yield (line, ``{"id", "messages"}``) of whole conversations in the order of the file,
        segments merged. Messages have a ``role`` and ``content``."""
        found = parsed(self.path, json_array(self.path, bad), _segment, bad)
        for name, group in groupby(found, key=lambda one: one[1][0]):
            segments, messages = [*group], Chat()
            for _, (_, start, said) in segments:
                # A segment may begin with the last message of the previous one.
                messages += said[max(0, len(messages) - start) :]
            if messages:
                yield segments[0][0], Record(id=name, messages=messages)

    def parser(self) -> Callable[[Record], Iterator[list[TraceRequest]]]:
        chat = load_chat_text(self.tokenizer, self.template)

        def parse(record: Record) -> Iterator[list[TraceRequest]]:
            found, said = [], record["messages"]
            for place, (before, message) in enumerate(pairwise(said), 1):
                if (before["role"], message["role"]) == ("user", "assistant"):
                    turn = chat.turn(said[:place], message["content"])
                    if len(turn.prompt) > self.cap:
                        break
                    found.append(turn.request(record["id"]))
            yield found

        return parse


def _segment(record: Record) -> Iterator[tuple[str, int, Chat]]:
    """Yield (conversation, index of its first message, messages)."""
    whole = str(record.key("id"))
    base, _, first = whole.rpartition("_")
    said = [
        {"role": _ROLES.get(one.text("from"), "assistant"), "content": one.text("value")}
        for one in record.objects("conversations")
    ]
    yield (base, int(first), said) if first.isdecimal() else (whole, 0, said)
