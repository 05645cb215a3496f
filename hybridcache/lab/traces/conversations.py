"""Whole conversations, every answer a request: JSON lines of ``{"messages": [..., answer]}``, as
for fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import ClassVar

from hybridcache.lab.arrivals import Pauses
from hybridcache.lab.trace import TraceRequest
from hybridcache.lab.traces.dialects import plain_chat
from hybridcache.lab.traces.frame import Notes, Record, SessionReader
from hybridcache.lab.traces.prompts import NAMES
from hybridcache.lab.traces.text import load_chat_text

ANSWERS = ("assistant", "model")
"""Roles of answers."""


@dataclass(frozen=True, slots=True)
class ConversationsReader(SessionReader):
    """Conversations of a fine-tuning file; turns follow after ``pauses``."""

    word: ClassVar[str] = "conversations"
    tokenizer: str = ""
    template: str = "chatml"
    pauses: Pauses = field(default_factory=Pauses)

    @staticmethod
    def recognises(record: Record) -> bool:
        said = record.get("messages")
        last = said[-1] if isinstance(said, list) and said else None
        is_whole = isinstance(last, dict) and str(last.get("role")).lower() in ANSWERS
        return is_whole and record.first(NAMES["answer"]) is None

    def parser(self) -> Callable[[Record], Iterator[list[TraceRequest]]]:
        chat = load_chat_text(self.tokenizer, self.template)
        numbers, notes = count(1), Notes(self.path)

        def parse(record: Record) -> Iterator[list[TraceRequest]]:
            number, found = next(numbers), []
            name, messages = self.conversation(record, number)
            for problem in self.unread(record, messages):
                notes.warn(problem, f"{problem} (first in conversation {number})")
            said = plain_chat(messages, None, record.get("tools"))
            num_added = len(said) - len(messages)  # a system message with the tools
            for place, message in enumerate(said):
                if place > num_added and message["role"] == "assistant":
                    turn = chat.turn(said[:place], message["content"], tools=True)
                    calls = messages[place - num_added].get("tool_calls")
                    reason = "tool_use" if calls else "end_turn"
                    found.append(turn.request(name)._replace(stop_reason=reason))
            yield found

        return parse

    def conversation(self, record: Record, number: int) -> tuple[str | int, list[Record]]:
        """Return (session, messages) of the ``number``-th record."""
        return number, record.objects("messages")

    def unread(self, record: Record, messages: list[Record]) -> Iterator[str]:
        """Yield sentences about contents that no request shows."""
        if messages and str(messages[-1].get("role")).lower() not in ANSWERS:
            yield "messages after the last answer are left out"
        if time := record.first(NAMES["time"]):
            yield f"{time} of whole conversations is not read: starts= and pause= set the times"
