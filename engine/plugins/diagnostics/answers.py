"""The tokens that were sampled for the latest answers, to be found by what a client sends back."""

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

from engine.text.splice import SampledTurn

ENTRY_BYTES = 512
"""What an answer takes beside its ids and its reasoning."""
MAX_ALIKE = 8
"""Answers with the same text and calls that are told apart by their place and their reasoning."""


@dataclass(frozen=True, slots=True)
class _Entry:
    place: int
    turn: SampledTurn
    chat: bytes | None

    @property
    def num_bytes(self) -> int:
        return ENTRY_BYTES + 4 * len(self.turn.token_ids) + sys.getsizeof(self.turn.reasoning)


class AnswerMemory:
    """Sampled answers in ``limit_bytes``, the latest used stay. Safe from any thread."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._known: OrderedDict[tuple[Hashable, bytes], list[_Entry]] = OrderedDict()
        """By tenant and digest of what was said."""
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
        """Remember an answer to a chat of ``place`` messages, which was given as ``message``.
        ``chat``: digest of that chat, if its reasoning is for nobody who does not send it all.
        O(its size)."""
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
        """What was sampled for ``message``, the one with the index ``place``, as a template takes
        it. Its reasoning must be what was sampled; ``keeps_thinking``: or left out, behind the same
        ``chat``. Of several the one that stood at the same place, else the latest. O(its size)."""
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
        """AssertionError: the books are wrong. O(answers)."""
        sizes = [entry.num_bytes for alike in self._known.values() for entry in alike]
        assert all(self._known.values())
        assert sum(sizes) == self.num_bytes <= self._limit_bytes


def said_by(message: Mapping[str, Any]) -> list[Any]:
    """What a message says, in one spelling: the same for an answer and for what a client sends back
    of it, reasoning included."""
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
    """Arguments in one spelling, whatever JSON they came in."""
    try:
        value = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments or {}
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    except (ValueError, RecursionError):
        return str(arguments)


def _digest(message: Mapping[str, Any]) -> bytes:
    """Of its text and calls, without its reasoning."""
    return hashlib.blake2b(json.dumps(said_by(message)[:2]).encode(), digest_size=16).digest()
