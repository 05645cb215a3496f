"""ShareGPT: an array of ``{"id": "abc_0", "conversations": [{"from": "human", "value": "..."}]}``.

A record is a segment: its id ends in the index of its first message. Segments of one conversation
follow each other, and the message at the border is often in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any, ClassVar

from hybridcache.lab.arrivals import Pauses
from hybridcache.lab.trace import BadRecords, TraceRequest
from hybridcache.lab.traces.frame import Record, SessionReader, json_array, parsed
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
    """Longest prompt, in tokens."""
    pauses: Pauses = field(default_factory=Pauses)
    limit: int | None = None
    """Number of conversations to read, or None for all."""

    @staticmethod
    def recognises(record: Record) -> bool:
        return "conversations" in record

    def records(self, bad: BadRecords) -> Iterator[tuple[int, Record]]:
        return islice(_conversations(self.path, bad), self.limit)

    def parser(self) -> Callable[[Record], Iterator[list[TraceRequest]]]:
        chat = load_chat_text(self.tokenizer, self.template)

        def parse(record: Record) -> Iterator[list[TraceRequest]]:
            said: list[dict[str, str]] = []
            found = []
            for role, words in record["turns"]:
                if role == "assistant" and said and said[-1]["role"] == "user":
                    turn = chat.turn(said, words)
                    if len(turn.prompt) > self.cap:
                        break
                    found.append(turn.request(record["id"]))
                said.append({"role": role, "content": words})
            yield found

        return parse


def _conversations(path: Path, bad: BadRecords) -> Iterator[tuple[int, Record]]:
    """Yield (line, ``{"id", "turns"}``) of whole conversations in the order of the file, segments
    merged. Turns are (role, text), with roles ``user``, ``assistant`` and ``system``."""

    def segment(record: Record) -> Iterator[tuple[str, int, Any]]:
        """Yield (conversation, index of its first message, messages)."""
        whole = str(record.key("id"))
        base, _, first = whole.rpartition("_")
        said = [
            (_ROLES.get(message.text("from"), "assistant"), message.text("value"))
            for message in record.objects("conversations")
        ]
        yield (base, int(first), said) if first.isdecimal() else (whole, 0, said)

    found = parsed(path, json_array(path, bad), segment, bad)
    for name, segments in groupby(found, key=lambda one: one[1][0]):
        lines, turns = list[int](), list[tuple[str, str]]()
        for line, (_, start, said) in segments:
            lines.append(line)
            # A segment may begin with the last message of the previous one.
            turns += said[max(0, len(turns) - start) :]
        if turns:
            yield lines[0], Record(id=name, turns=turns)
