"""Whole conversations, every answer a request: JSON lines of ``{"messages": [..., answer]}``, as
for fine-tuning, and the trajectories of tau-bench (sierra-research/tau-bench)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import ClassVar

from hybridcache.lab.arrivals import Pauses, Starts
from hybridcache.lab.trace import BadRecords, TraceRequest
from hybridcache.lab.traces.dialects import plain_chat, role_of
from hybridcache.lab.traces.frame import (
    UNANSWERED,
    UNUSED_REST,
    Line,
    Notes,
    Record,
    SessionReader,
    TraceClock,
    json_array,
)
from hybridcache.lab.traces.messages import (
    EMPTY,
    NAMES,
    NULL,
    Conversation,
    Named,
    is_null,
    spelled,
    unread_of_empty,
)
from hybridcache.lab.traces.text import load_chat_text


@dataclass(frozen=True, slots=True)
class ConversationsReader(SessionReader):
    """Conversations of a fine-tuning file; turns follow after ``pause``, unless all messages have
    times: a request arrives with the message before its answer."""

    word: ClassVar[str] = "conversations"
    tokenizer: str = ""
    template: str = "chatml"
    pause: Pauses = field(default_factory=Pauses)

    @staticmethod
    def recognises(record: Record) -> bool:
        record = spelled(record)
        said = record.get("messages")
        last = said[-1] if isinstance(said, list) and said else None
        is_whole = isinstance(last, dict) and role_of(spelled(Record(last))) == "assistant"
        return is_whole and record.first(NAMES["answer"]) is None

    def parser(self, notes: Notes) -> Callable[[Record], Iterator[list[TraceRequest]]]:
        chat = load_chat_text(self.tokenizer, self.template)
        numbers, clock = count(1), TraceClock()
        has_times = self.has_times

        def parse(record: Record) -> Iterator[list[TraceRequest]]:
            number, found, record = next(numbers), list[TraceRequest](), spelled(record)
            name, messages = self.conversation(record, number)
            said = plain_chat(messages, None, record.get("tools"))
            num_added = len(said) - len(messages)  # a system message with the tools
            conversation = Conversation(chat, name)
            conversation.said += said[:num_added]
            for message, one in zip(said[num_added:], messages, strict=True):
                is_timed = has_times and message["role"] != "system"
                now_s = Named(one, {}).time_s(clock) if is_timed else None
                request = conversation.add(message, one, now_s)
                found += [] if request is None else [request]
            problems = self.unread(record, messages, has_times) if found else [UNANSWERED]
            for problem in problems:
                notes.count(problem)
            yield found

        return parse

    @property
    def has_times(self) -> bool:
        """True if all messages of the first conversation but its system message have a time, and no
        other times are set."""
        usual, messages = type(self)(self.path), list[Record]()
        with suppress(KeyError, ValueError):
            messages = self.conversation(spelled(self.first), 1)[1]
        messages = [one for one in messages if role_of(one) != "system"]
        is_usual = (self.starts, self.pause) == (usual.starts, usual.pause)
        return is_usual and bool(messages) and all(one.first(NAMES["time"]) for one in messages)

    def conversation(self, record: Record, number: int) -> tuple[str | int, list[Record]]:
        """Return (session, messages) of the ``number``-th record."""
        return number, [spelled(message) for message in record.objects("messages")]

    def unread(self, record: Record, messages: list[Record], has_times: bool) -> Iterator[str]:
        """Yield descriptions of contents that no request shows, for ``Notes.count``."""
        if role_of(messages[-1]) != "assistant":
            yield UNUSED_REST
        if any(map(is_null, messages)):
            yield f"with messages {NULL}"
        empty = {name for one in messages for name in unread_of_empty(one, NAMES["time"])}
        if empty:
            yield f"where {EMPTY}: {', '.join(sorted(empty))}"
        times = filter(None, (one.first(NAMES["time"]) for one in (record, *messages)))
        if not has_times and (time := next(times, None)):
            rule = "starts= and pause= set the times unless all messages have one"
            yield f"where {time} is not read: {rule}"


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

    def unread(self, record: Record, messages: list[Record], has_times: bool) -> Iterator[str]:
        return iter(())  # A customer has the last word.
