"""ShareGPT: an array of ``{"id": "abc_0", "conversations": [{"from": "human", "value": "..."}]}``.

A record is a conversation, or a segment of one, whose id ends in the index of its first message.
Segments follow each other, and the message at the border is often in both. The index does not
count a ``system`` message, which each segment may repeat. ``ShareGPTCountsReader`` reads lengths of
messages without their texts, one conversation a line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import ClassVar

import numpy as np

from hybridcache.lab.arrivals import Pauses
from hybridcache.lab.trace import BadRecords, FreshIds, TraceRequest, distinct
from hybridcache.lab.traces.dialects import ROLES, Chat
from hybridcache.lab.traces.frame import (
    CUT,
    UNANSWERED,
    Line,
    Notes,
    Record,
    SessionReader,
    json_array,
    shown,
)
from hybridcache.lab.traces.text import load_chat_text
from hybridcache.policies.protocol import chat_boundaries
from hybridcache.tokens import Tokens

_ROLES = ROLES | {
    "function_call": "assistant",
    **dict.fromkeys(("observation", "function_response"), "tool"),
}


@dataclass(frozen=True, slots=True)
class ShareGPTReader(SessionReader):
    """Conversations of people. Every answer that follows a question, or a tool's result, is a
    request; a conversation ends at ``cap`` tokens."""

    word: ClassVar[str] = "sharegpt"
    tokenizer: str = "qwen3.5"
    template: str = "chatml"
    """The answers hold no thoughts, so the plain template is the default."""
    cap: int = 8192
    pause: Pauses = field(default_factory=Pauses)
    limit: int | None = None

    @staticmethod
    def recognises(record: Record) -> bool:
        return "conversations" in record

    def records(self, bad: BadRecords) -> Iterator[tuple[Line, Record]]:
        return islice(self._whole(bad), self.limit)

    def _whole(self, bad: BadRecords) -> Iterator[tuple[Line, Record]]:
        """Yield (line, ``{"id", "messages"}``) of whole conversations, segments merged."""
        line: Line
        line, name, base, system, messages = 0, "", "", Chat(), Chat()
        taken, are_indices = Counter[str](), True
        records = self.parsed(json_array(self.path, bad), _segment)
        for at, (id_, leading, said) in records:
            if not said:
                yield at, Record(id=id_, messages=said)
                continue
            before = base
            base, _, index = id_.rpartition("_")
            start = int(index) if base and index.isdecimal() else 0
            if are_indices and start and base == before and leading in ([], system):
                if _continues(messages, start, said):
                    messages += said[len(messages) - start :]
                    continue
                are_indices = start > len(messages)  # else they count conversations
            if messages:
                yield line, Record(id=name, messages=system + messages)
            name = base if base and index.isdecimal() and base not in taken else id_
            line, name, system, messages = at, distinct(name, taken), leading, said
        if messages:
            yield line, Record(id=name, messages=system + messages)

    def parser(self, notes: Notes) -> Callable[[Record], Iterator[list[TraceRequest]]]:
        chat = load_chat_text(self.tokenizer, self.template)

        def parse(record: Record) -> Iterator[list[TraceRequest]]:
            found, said = [], record["messages"]
            for place, (before, message) in enumerate(pairwise(said), 1):
                if before["role"] in ("user", "tool") and message["role"] == "assistant":
                    turn = chat.turn(said[:place], message["content"])
                    if len(turn.tokens) > self.cap:
                        notes.count(CUT.format(self.cap))
                        break
                    found.append(turn._replace(session=record["id"]))
            else:
                if not found:
                    notes.count(UNANSWERED)
            yield found

        return parse


def _continues(messages: Chat, start: int, said: Chat) -> bool:
    """Return whether a segment follows ``messages``. It may begin with their last one."""
    return start == len(messages) or (start == len(messages) - 1 and messages[-1:] == said[:1])


def _segment(record: Record) -> Iterator[tuple[str, Chat, Chat]]:
    """Yield (id, system message, other messages)."""
    said, leading = Chat(), Chat()
    if record.get("system"):
        leading.append({"role": "system", "content": record.text("system")})
    for one in record.objects("conversations"):
        role = _ROLES.get(one.text("from").lower())
        if role is None:
            raise ValueError(f"from is {shown(one['from'])}, none of {', '.join(_ROLES)}")
        said.append({"role": role, "content": one.text("value")})
    yield str(record.key("id")), leading, said


@dataclass(frozen=True, slots=True)
class ShareGPTCountsReader(SessionReader):
    """Lengths of messages: ``{"id", "turns": [["u", 39], ["a", 257]], "first_msg_blocks16": [0]}``.
    First messages agree in equal blocks of 16 tokens. Messages are framed as in ChatML (nine ids),
    and prompts end in a thought that the next does not keep."""

    word: ClassVar[str] = "sharegpt-counts"
    cap: int = 8192
    pause: Pauses = field(default_factory=Pauses)

    @staticmethod
    def recognises(record: Record) -> bool:
        return "turns" in record and "first_msg_blocks16" in record

    def parser(self, notes: Notes) -> Callable[[Record], Iterator[list[TraceRequest]]]:
        fresh, empty, end, thought = FreshIds(), *map(_ids, ([], [5, 6], [7, 8]))
        headers = {role: _ids([0, number, 4]) for number, role in enumerate("uas", 1)}

        def parse(record: Record) -> Iterator[list[TraceRequest]]:
            name, blocks = record.key("id"), record.ids("first_msg_blocks16")
            if len(blocks) and blocks.max() >= 1 << 20:
                raise ValueError("first_msg_blocks16 holds a block that is not below 2**20")
            shared = (9 + 16 * blocks[:, None] + np.arange(16, dtype=np.int32)).reshape(-1)
            history, asked, found = empty, False, []
            for turn in record.values_of("turns"):
                role, length = turn
                count = Record(turns=length).whole("turns")
                opened, words = np.concatenate((history, headers[role])), fresh.take(count)
                words[: len(shared)], shared = shared[:count], shared[:0]
                prompt = np.concatenate((opened, thought))
                if role == "a" and asked:
                    if len(prompt) > self.cap:
                        notes.count(CUT.format(self.cap))
                        break
                    known, survives = chat_boundaries(len(prompt), kept=(len(opened),))
                    answer = np.concatenate((words, end[:1]))
                    one = TraceRequest(0.0, name, None, prompt, answer, known)
                    found.append(one._replace(answer_survives=survives))
                history, asked = np.concatenate((opened, words, end)), role == "u"
            yield found

        return parse


def _ids(values: list[int]) -> Tokens:
    return np.asarray(values, np.int32)
