"""ShareGPT: an array of ``{"id": "abc_0", "conversations": [{"from": "human", "value": "..."}]}``.

A record is a conversation, or a segment of one, whose id ends in the index of its first message."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import ClassVar

from hybridcache.lab.traces.arrivals import Pauses
from hybridcache.lab.traces.dialects import Chat, role_of
from hybridcache.lab.traces.frame import Line, Notes, Record, Records, SessionReader
from hybridcache.lab.traces.named import messages_in
from hybridcache.lab.traces.text import load_chat_text
from hybridcache.lab.traces.trace import BadRecords, TraceRequest, distinct


@dataclass(frozen=True, slots=True)
class ShareGPTReader(SessionReader):
    """Conversations of people. An answer after a question, or a tool's result, is a request."""

    word: ClassVar[str] = "sharegpt"
    tokenizer: str = "qwen3.5"
    template: str = "chatml"
    cap: int = 8192
    pause: Pauses = field(default_factory=Pauses)
    limit: int | None = None

    @staticmethod
    def recognises(record: Record) -> bool:
        return "conversations" in record

    def records(self, bad: BadRecords) -> Records:
        segments = self.parsed(SessionReader.records(self, bad), _segment)
        return islice(_whole(segments), self.limit)

    def parser(self, notes: Notes) -> Callable[[Record], Iterator[TraceRequest]]:
        chat = load_chat_text(self.tokenizer, self.template)

        def parse(record: Record) -> Iterator[TraceRequest]:
            said: Chat = record.values_of("said")
            for place, (before, message) in enumerate(pairwise(said), 1):
                if before["role"] in ("user", "tool") and message["role"] == "assistant":
                    request = chat.turn(said[:place], message["content"])
                    yield request._replace(session=record.text("session"))

        return parse


def _segment(record: Record) -> Iterator[tuple[str, int, Chat, Chat]]:
    name = "conversation" if record.get("id") is None else str(record.key("id"))
    base, _, index = name.rpartition("_")
    name, start = (base, int(index)) if base and index.isdecimal() else (name, 0)
    system = [{"role": "system", "content": record.text("system")}] if record.get("system") else []
    messages = messages_in(record, "conversations")
    said = [{"role": role_of(one), "content": one.text("content")} for one in messages]
    yield name, start, system, said


def _whole(segments: Iterator[tuple[Line, tuple[str, int, Chat, Chat]]]) -> Records:
    """Yield conversations. Segments follow each other, and may repeat the message at the border."""
    line: Line = 0
    last, system, whole, taken, are_indices = "", Chat(), Chat(), Counter[str](), True
    for at, (name, start, leading, said) in segments:
        if not said:
            yield at, {"said": said}
            continue
        is_same = name == last and leading in ([], system)
        if start and is_same and are_indices:
            repeated = len(whole) - start
            if repeated >= 0 and whole[start:] == said[:repeated]:
                whole += said[repeated:]
                continue
            are_indices = repeated < 0  # else they count conversations
        if whole:
            yield line, {"session": distinct(last, taken), "said": system + whole}
        line, last, system, whole = at, name, leading, said
    if whole:
        yield line, {"session": distinct(last, taken), "said": system + whole}
