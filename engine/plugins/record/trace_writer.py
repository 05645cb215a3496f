"""Writes requests as lines of a trace, in the laboratory's own format (``jsonl``).

Without a tokenizer, one id stands for ``PIECE`` characters, about the length of a token. With
``--text hash``, an id is a keyed hash of all text up to it: equal ids mean equal prefixes, and the
text cannot be recovered.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import threading
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from engine.text.chat_prompt import render_chat
from engine.text.tokenizer import EncodeOptions, TemplateError, Tokenizer

logger = logging.getLogger(__name__)
PIECE = 4
"""Characters per id."""
MAX_TAIL = 1 << 18
"""Maximum number of lines after an open place that are tracked: 25 MB."""
BLOCK_BYTES = 1 << 20
HEADER, END = "<|im_start|>", "<|im_end|>\n"
ALONE = EncodeOptions(add_special_tokens=False)


@dataclass(frozen=True, slots=True)
class Recorded:
    """A request that was answered."""

    seconds: float
    body: Mapping[str, Any]
    answer: Mapping[str, Any]
    """Answer as a message of the assistant."""


class OrderedLines:
    """Lines of a file, in the order of their places, written in any order.

    Each line is written as soon as it is given, so only running requests are lost if the process is
    killed. A line for an earlier place is inserted there, which rewrites the lines after it. Only
    lines that were added while its request was running can follow it.
    """

    def __init__(self, file: BinaryIO) -> None:
        """``file`` is open for reading and writing, and has no other user."""
        self._file = file
        self._lock = threading.Lock()
        self._num_places = 0
        self._open: dict[int, None] = {}
        """Places that were taken and are not yet used, in order."""
        self._tail: list[tuple[int, int]] = []
        """(place, bytes) of the last lines: all lines after an open place."""

    def take_place(self) -> int:
        """Return the next place; ``put`` or ``give_up`` must follow. O(1)."""
        with self._lock:
            self._num_places += 1
            self._open[self._num_places] = None
            return self._num_places

    def put(self, place: int, line: bytes) -> bool:
        """Write ``line`` at ``place``. Returns False if more than ``MAX_TAIL`` lines follow it.

        Raises OSError if the file cannot grow; it is then unchanged. O(size of the line and of
        those after it).
        """
        with self._lock:
            if place not in self._open:
                return False
            rank = bisect(self._tail, (place, 0))
            _insert(self._file.fileno(), line, sum(size for _, size in self._tail[rank:]))
            self._tail.insert(rank, (place, len(line)))
            del self._open[place]
            self._trim()
        return True

    def give_up(self, place: int) -> None:
        """Leave ``place`` empty. Does nothing if it was used."""
        with self._lock:
            if place in self._open:
                del self._open[place]
                self._trim()

    def _trim(self) -> None:
        """Remove the lines that follow no open place, and the open places that too many lines
        follow."""
        while True:
            first = next(iter(self._open), self._num_places + 1)
            del self._tail[: bisect(self._tail, (first, 0))]
            if len(self._tail) <= MAX_TAIL:
                return
            del self._open[first]


def _insert(file: int, line: bytes, size_below: int) -> None:
    """Insert ``line`` before the last ``size_below`` bytes of ``file``.

    It is appended first, so that the file has its final length and is valid. Then the data after it
    moves in blocks, the last block first. The first block and the line are written in one call. A
    process that is killed leaves no partial line unless more than one block moves.
    """
    end = os.fstat(file).st_size
    try:
        _write_at(file, end, line)
    except OSError:
        os.ftruncate(file, end)
        raise
    at, moved = end - size_below, b""
    while end > at:
        start = max(at, end - BLOCK_BYTES)
        moved = os.pread(file, end - start, start)
        if start > at:
            _write_at(file, start + len(line), moved)
        end = start
    if size_below:
        _write_at(file, at, line + moved)


def _write_at(file: int, place: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, place)
        place, view = place + count, view[count:]


class TraceWriter:
    """Writes requests in the order of their arrival, each as soon as it is answered. Any thread may
    use it, but only one thread ``write``."""

    def __init__(
        self,
        file: BinaryIO,
        *,
        keeps_text: bool,
        tokenizer: Tokenizer | None,
        counted_by: str | None = None,
    ) -> None:
        """``file`` is empty, and open for reading and writing. ``counted_by`` goes into its first
        line, for readers."""
        self._lines = OrderedLines(file)
        self._keeps_text = keeps_text
        self._tokenizer = tokenizer
        self._key = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self.num_requests = 0
        self.skipped: Counter[str] = Counter()
        """Number of requests that are not in the trace, by reason."""
        header = {"format": "hybridcache", "version": 1, "unit": 1}
        named = {} if counted_by is None else {"counted_by": counted_by}
        self._lines.put(self.take_place(), _line(header | named))

    def take_place(self) -> int:
        """Return the place of a request that has just arrived, for ``write``."""
        return self._lines.take_place()

    def write(self, place: int, recorded: Recorded | None) -> None:
        """Add one request at ``place``, or leave the place empty if it is None. Raises OSError if
        the file cannot grow. O(its size)."""
        line = None if recorded is None else self._line_of(recorded)
        if line is None:
            self.give_up(place)
        elif self._lines.put(place, line):
            self.num_requests += 1
        else:
            self.skip(f"{MAX_TAIL:,} later requests ended before they were answered")

    def give_up(self, place: int) -> None:
        """Leave ``place`` empty if it is not used."""
        self._lines.give_up(place)

    def _line_of(self, recorded: Recorded) -> bytes | None:
        body, answer = recorded.body, recorded.answer
        ids, boundaries = self._prompt(body)
        if not ids:
            self.skip("bodies with several prompts, or none, are not written")
            return None
        output = self._answer(answer)
        if not self._keeps_text:
            hashed = self._hashed([*ids, *output])
            ids, output = hashed[: len(ids)], hashed[len(ids) :]
        line: dict[str, Any] = {
            "timestamp": round(recorded.seconds, 3),
            "session": self._digest(json.dumps(_beginning(body))),
            "namespace": self._digest(json.dumps([body.get("model"), body.get("cache_salt")])),
            "tokens": ids,
            "output": output,
        }
        if boundaries:
            line["boundaries"] = boundaries
        if self._keeps_text:
            line |= {"request": body, "answer": answer}
        return _line(line)

    def skip(self, why: str) -> None:
        """Count one request that is not written; the first for each reason is logged."""
        with self._lock:
            self.skipped[why] += 1
            is_first = self.skipped[why] == 1
        if is_first:
            logger.warning("Passed on, but %s.", why)

    def _prompt(self, body: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Return (ids, known boundaries) of the prompt of ``body``."""
        if "messages" not in body:
            prompt = body.get("prompt", "")
            if isinstance(prompt, list):
                return [int(one) for one in prompt if isinstance(one, int)], []
            return self._ids([str(prompt)]), []
        messages = [_message(message) for message in body["messages"]]
        if self._tokenizer is not None and self._tokenizer.chat_template is not None:
            try:
                chat = render_chat(
                    self._tokenizer,
                    messages,
                    tools=body.get("tools"),
                    variables=body.get("chat_template_kwargs"),
                )
                return chat.token_ids, list(chat.boundaries)
            except TemplateError:
                pass  # The recorded server accepted it; use the plain form.
        tools = json.dumps(body["tools"]) if body.get("tools") else ""
        texts = [tools, *(text for message in messages for text in _texts(message))]
        return self._ids([*texts, f"{HEADER}assistant\n"]), []

    def _answer(self, answer: Mapping[str, Any]) -> list[int]:
        return self._ids(_texts(_message(answer))[1:])

    def _ids(self, texts: Sequence[str]) -> list[int]:
        """Return the ids of consecutive texts. No id spans two of them."""
        if self._tokenizer is not None:
            return [i for text in texts for i in self._tokenizer.encode(text, ALONE)]
        return [_number(piece.encode("utf-8", "replace")) for text in texts for piece in _cut(text)]

    def _hashed(self, ids: Sequence[int]) -> list[int]:
        chain, hashed = self._key, []
        for one in ids:
            chain = hashlib.blake2b(one.to_bytes(8, "little"), key=chain, digest_size=32).digest()
            hashed.append(int.from_bytes(chain[:4], "little") & 0x7FFFFFFF)
        return hashed

    def _digest(self, text: str) -> str:
        raw = text.encode("utf-8", "replace")
        return hashlib.blake2b(raw, key=self._key, digest_size=8).hexdigest()


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"


def _beginning(body: Mapping[str, Any]) -> Any:
    """Return the part of a body that distinguishes conversations: all up to the first message of
    the user."""
    messages = body.get("messages")
    if not isinstance(messages, list):
        return body.get("prompt")
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    return messages[: roles.index("user") + 1 if "user" in roles else 1]


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message in the form that chat templates require."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "\n".join(str(part.get("text", "")) for part in content)
    plain = {**message, "content": content}
    calls = [dict(call) for call in message.get("tool_calls") or ()]
    for call in calls:
        function = dict(call.get("function") or {})
        if isinstance(text := function.get("arguments"), str):
            function["arguments"] = _parsed(text)
        call["function"] = function
    return plain | ({"tool_calls": calls} if calls else {})


def _parsed(text: str) -> Any:
    try:
        return json.loads(text or "{}")
    except ValueError:
        return text


def _texts(message: Mapping[str, Any]) -> list[str]:
    """Return a message in the plain form: its header, its text and its end."""
    functions = [call.get("function") for call in message.get("tool_calls") or ()]
    said = str(message.get("reasoning_content") or "") + str(message["content"])
    said += json.dumps(functions) if functions else ""
    return [f"{HEADER}{message.get('role')}\n", said, END]


def _cut(text: str) -> Iterator[str]:
    for start in range(0, len(text), PIECE):
        yield text[start : start + PIECE]


def _number(piece: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(piece, digest_size=4).digest(), "little") & 0x7FFFFFFF
