"""Whole conversations, every answer a request: JSON lines of ``{"messages": [..., answer]}``, as
for fine-tuning, and the trajectories of tau-bench (sierra-research/tau-bench)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import ClassVar

from hybridcache.lab.traces.arrivals import Pauses, Starts
from hybridcache.lab.traces.dialects import plain_chat
from hybridcache.lab.traces.frame import Notes, Record, SessionReader
from hybridcache.lab.traces.named import Named, messages_in, spelled
from hybridcache.lab.traces.text import load_chat_text
from hybridcache.lab.traces.trace import TraceRequest


@dataclass(frozen=True, slots=True)
class ConversationsReader(SessionReader):
    """Conversations of a fine-tuning file. Turns follow after ``pause``."""

    word: ClassVar[str] = "conversations"
    tokenizer: str = ""
    template: str = "chatml"
    pause: Pauses = field(default_factory=Pauses)

    @staticmethod
    def recognises(record: Record) -> bool:
        """Return whether its messages end with an answer, or are a list ``conversation``, as in
        LMSYS-Chat-1M and WildChat."""
        return Named(record, {}).is_whole or _listed(record) == "conversation"

    def parser(self, notes: Notes) -> Callable[[Record], Iterator[TraceRequest]]:
        chat, numbers = load_chat_text(self.tokenizer, self.template), count(1)

        def parse(record: Record) -> Iterator[TraceRequest]:
            record = spelled(record)
            name, messages = self.conversation(record, next(numbers))
            said = plain_chat(messages, None, record.get("tools"), notes)
            for place, one in enumerate(said):
                if place and one["role"] == "assistant":
                    request = chat.turn(said[:place], one["content"], tools=True)
                    is_call = messages[place - len(said)].get("tool_calls")
                    reason = "tool_use" if is_call else "end_turn"
                    yield request._replace(session=name, stop_reason=reason)

        return parse

    def conversation(self, record: Record, number: int) -> tuple[str | int, list[Record]]:
        """Return (session, messages) of the ``number``-th record."""
        return number, messages_in(record, _listed(record))


def _listed(record: Record) -> str:
    """Return the name of the field with the messages of a conversation."""
    with suppress(KeyError, ValueError, IndexError):
        if "messages" not in record and messages_in(record, "conversation")[0]["role"]:
            return "conversation"
    return "messages"


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

    def conversation(self, record: Record, number: int) -> tuple[str | int, list[Record]]:
        task, trial = (record.get(name, number) for name in ("task_id", "trial"))
        return f"task {task}, trial {trial}", record.objects("traj")
