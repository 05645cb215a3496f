"""Memory of the tokens sampled for recent answers, found by the messages that clients send back."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.text.chat_prompt import SampledTurn

ENTRY_BYTES = 512
"""Approximate size of an answer without its ids and its reasoning."""
MAX_ALIKE = 8
"""Maximum number of answers with the same text and calls. They are distinguished by their place and
their reasoning."""


@dataclass(frozen=True, slots=True)
class _Entry:
    place: int
    turn: SampledTurn
    chat: bytes | None

    @property
    def num_bytes(self) -> int:
        return ENTRY_BYTES + 4 * len(self.turn.token_ids) + sys.getsizeof(self.turn.reasoning)


class AnswerMemory:
    """Sampled answers in ``limit_bytes``, with least recently used ones evicted. Thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._known: OrderedDict[tuple[Hashable, bytes], list[_Entry]] = OrderedDict()
        """Answers by tenant and digest of the message."""
        self._lock = threading.Lock()
        self.num_bytes = 0

    def put(
        self,
        tenant: Hashable,
        place: int,
        message: Mapping[str, Any],
        turn: SampledTurn,
        chat: bytes | None = None,
    ) -> None:
        """Store an answer to a chat of ``place`` messages, which was sent as ``message``. O(its
        size).

        ``chat`` is the digest of that chat if the reasoning is only for clients that send the whole
        chat.
        """
        turn = SampledTurn(turn.header, array("i", turn.token_ids), turn.reasoning)
        key, entry = (tenant, _digest(message)), _Entry(place, turn, chat)
        if entry.num_bytes > self._limit_bytes:
            return
        with self._lock:
            alike = self._known.setdefault(key, [])
            alike.append(entry)
            self.num_bytes += entry.num_bytes
            if len(alike) > MAX_ALIKE:
                self.num_bytes -= alike.pop(0).num_bytes
            self._known.move_to_end(key)
            while self.num_bytes > self._limit_bytes:
                self._forget_oldest()

    def _forget_oldest(self) -> None:
        key, alike = next(iter(self._known.items()))
        self.num_bytes -= alike.pop(0).num_bytes
        if not alike:
            del self._known[key]

    def find(
        self,
        tenant: Hashable,
        place: int,
        message: Mapping[str, Any],
        keeps_thinking: bool,
        chat: bytes | None = None,
    ) -> SampledTurn | None:
        """Return the turn sampled for ``message``, which has the index ``place``, or None. O(its
        size).

        Its reasoning must be equal, or with ``keeps_thinking`` be missing in the same ``chat``. Of
        several turns, the one at the same place is returned, else the latest.
        """
        if message.get("role") != "assistant":
            return None
        key = tenant, _digest(message)
        given = str(message.get("reasoning_content") or "").strip()
        with self._lock:
            alike = list(self._known.get(key, ()))
            if alike:
                self._known.move_to_end(key)
        fits = [
            entry
            for entry in alike
            if entry.turn.reasoning.strip() == given
            or (keeps_thinking and not given and entry.chat == chat)
        ]
        best = max(
            enumerate(fits), key=lambda pair: (pair[1].place == place, pair[0]), default=None
        )
        return None if best is None else best[1].turn

    def check(self) -> None:
        """Raise AssertionError if the recorded size is wrong. O(answers)."""
        sizes = [entry.num_bytes for alike in self._known.values() for entry in alike]
        assert all(self._known.values())
        assert sum(sizes) == self.num_bytes <= self._limit_bytes


def said_by(message: Mapping[str, Any]) -> list[Any]:
    """Return the contents of a message in a normal form, which is equal for an answer and its copy
    from a client, including reasoning."""
    return [
        str(message.get("content") or "").strip(),
        [_call(call) for call in message.get("tool_calls") or ()],
        str(message.get("reasoning_content") or "").strip(),
    ]


def _call(call: Any) -> list[Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return [repr(call)]
    return [function.get("name"), _plain(function.get("arguments"))]


def _plain(arguments: Any) -> str:
    """Return arguments in a normal form, independent of the JSON formatting."""
    try:
        value = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments or {}
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    except (ValueError, RecursionError):
        return str(arguments)


def _digest(message: Mapping[str, Any]) -> bytes:
    """Return the digest of text and calls, without reasoning."""
    return hashlib.blake2b(json.dumps(said_by(message)[:2]).encode(), digest_size=16).digest()
