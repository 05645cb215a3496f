"""Whole conversations, every answer a request: JSON lines of ``{"messages": [..., answer]}``, as
for fine-tuning, and the trajectories of tau-bench (sierra-research/tau-bench)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import ClassVar

from hybridcache.lab.arrivals import Pauses, Starts
from hybridcache.lab.trace import BadRecords, TraceRequest
from hybridcache.lab.traces.dialects import ROLES, plain_chat
from hybridcache.lab.traces.frame import UNANSWERED, Line, Notes, Record, SessionReader, json_array
from hybridcache.lab.traces.messages import NAMES, Conversation, spelled
from hybridcache.lab.traces.text import load_chat_text


@dataclass(frozen=True, slots=True)
class ConversationsReader(SessionReader):
    """Conversations of a fine-tuning file. Turns follow after ``pause``."""

    word: ClassVar[str] = "conversations"
    tokenizer: str = ""
    template: str = "chatml"
    pause: Pauses = field(default_factory=Pauses)

    @staticmethod
    def recognises(record: Record) -> bool:
        record = spelled(record)
        said = record.get("messages")
        last = said[-1] if isinstance(said, list) and said else None
        role = spelled(Record(last)).get("role") if isinstance(last, dict) else None
        is_whole = ROLES.get(str(role).lower()) == "assistant"
        return is_whole and record.first(NAMES["answer"]) is None

    def parser(self, notes: Notes) -> Callable[[Record], Iterator[list[TraceRequest]]]:
        chat, numbers = load_chat_text(self.tokenizer, self.template), count(1)

        def parse(record: Record) -> Iterator[list[TraceRequest]]:
            number, found, record = next(numbers), list[TraceRequest](), spelled(record)
            name, messages = self.conversation(record, number)
            said = plain_chat(messages, None, record.get("tools"))
            num_added = len(said) - len(messages)  # a system message with the tools
            conversation = Conversation(chat, name)
            conversation.said += said[:num_added]
            for message, one in zip(said[num_added:], messages, strict=True):
                request = conversation.add(message, one, None)
                found += [] if request is None else [request]
            if not found:
                notes.count(UNANSWERED)
            yield found

        return parse

    def conversation(self, record: Record, number: int) -> tuple[str | int, list[Record]]:
        """Return (session, messages) of the ``number``-th record."""
        return number, [spelled(message) for message in record.objects("messages")]


@dataclass(frozen=True, slots=True)
class TauBenchReader(ConversationsReader):
    """An array of ``{"task_id", "trial", "traj": [messages]}``. Customers and tools answer within a
    few seconds."""

    word: ClassVar[str] = "taubench"
    starts: Starts = field(default_factory=lambda: Starts("poisson", 0.2))
    pause: Pauses = field(default_factory=lambda: Pauses(median_s=5.0))

    @staticmethod
    def recognises(record: Record) -> bool:
        return "traj" in record

    def records(self, bad: BadRecords) -> Iterator[tuple[Line, Record]]:
        return json_array(self.path, bad)

    def conversation(self, record: Record, number: int) -> tuple[str | int, list[Record]]:
        name = f"task {record.key('task_id')}, trial {record.key('trial')}"
        return name, record.objects("traj")
