"""Whole conversations, every answer a request.

Fine-tuning files are JSON lines of ``{"messages": [..., answer]}``; tau-bench
(sierra-research/tau-bench) has an array of ``{"task_id", "trial", "traj": [messages]}``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from hybridcache.lab.arrivals import Pauses, Poisson, Starts
from hybridcache.lab.trace import BadRecords, TraceRequest
from hybridcache.lab.traces.dialects import plain_chat
from hybridcache.lab.traces.frame import Record, SessionReader, json_array, warn
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
        chat, number = load_chat_text(self.tokenizer, self.template), 0
        told = set[str]()

        def parse(record: Record) -> Iterator[list[TraceRequest]]:
            nonlocal number
            number += 1
            name, messages = self.conversation(record, number)
            for problem in self.unread(record, messages):
                if problem not in told:
                    told.add(problem)
                    warn(f"{self.path}: {problem} (first in conversation {number})")
            said = plain_chat(messages, None, record.get("tools"))
            num_added = len(said) - len(messages)  # a system message with the tools
            found = []
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


@dataclass(frozen=True, slots=True)
class TauBenchReader(ConversationsReader):
    """Trajectories of a tool agent; customers and tools answer within a few seconds."""

    word: ClassVar[str] = "taubench"
    starts: Starts = field(default_factory=lambda: Poisson(0.2))
    pauses: Pauses = field(default_factory=lambda: Pauses(median_s=5.0))

    @staticmethod
    def recognises(record: Record) -> bool:
        return "traj" in record

    def records(self, bad: BadRecords) -> Iterator[tuple[int, Record]]:
        return json_array(self.path, bad, "task_id")

    def conversation(self, record: Record, number: int) -> tuple[str | int, list[Record]]:
        name = f"task {record.key('task_id')}, trial {record.key('trial')}"
        return name, record.objects("traj")

    def unread(self, record: Record, messages: list[Record]) -> Iterator[str]:
        return iter(())  # A customer has the last word.
