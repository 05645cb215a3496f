"""Replay of sampled answers: the tokens that were sampled for an answer replace it when a client
sends it back, so that the prompt equals the cached one."""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.text.answers import MARKS
from engine.text.bounded_memory import BoundedMemory
from engine.text.outputs import RequestOutput
from engine.text.splices import SampledTurn
from engine.text.tokenizer import Tokenizer

KEEPS_THINKING = "preserve_thinking"
"""Template variable of newer templates; emulated for templates that do not support it."""
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
    """Sampled answers in ``limit_bytes``, by tenant and digest of the message. Thread-safe, except
    that one thread calls ``put``."""

    def __init__(self, limit_bytes: int) -> None:
        self._known = BoundedMemory[tuple[Hashable, bytes], tuple[_Entry, ...]](limit_bytes)

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
        alike = (*(self._known.get(key) or ()), entry)[-MAX_ALIKE:]
        while len(alike) > 1 and _num_bytes(alike) > self._known.limit_bytes:
            alike = alike[1:]
        self._known.put(key, alike, _num_bytes(alike))

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
        alike = self._known.get((tenant, _digest(message))) or ()
        given = str(message.get("reasoning_content") or "").strip()
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
        self._known.check()


def _num_bytes(entries: Sequence[_Entry]) -> int:
    return sum(entry.num_bytes for entry in entries)


def _digest(message: Mapping[str, Any]) -> bytes:
    """Return the digest of text and calls, without reasoning."""
    return hashlib.blake2b(json.dumps(said_by(message)[:2]).encode(), digest_size=16).digest()


def said_by(message: Mapping[str, Any]) -> list[Any]:
    """Return text, calls and reasoning of a message in a normal form, which is equal for an answer
    and its copy from a client."""
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


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a chat."""

    tenant: Hashable
    index: int
    """Number of messages before it."""
    chat: bytes | None
    """Digest of the chat before it. None if a secret identifies the tenant: its answers may then be
    replaced with their reasoning at any place."""


@dataclass(frozen=True, slots=True)
class RestoredChat:
    """Inputs for rendering a chat whose earlier answers are replayed."""

    messages: list[dict[str, Any]]
    variables: Mapping[str, Any] | None
    sampled: Mapping[int, SampledTurn]
    """Tokens that were sampled for earlier answers, by index of the message."""
    keeps_thinking: bool
    place: Place
    """Place of the answer in the chat."""


class Replay:
    """Sampled answers of one server. Replayed prompts keep the beginning of earlier ones: sampled
    tokens replace answers that come back."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        limit_bytes: int,
        *,
        keeps_thinking: bool = False,
    ) -> None:
        """``keeps_thinking``: the default of requests without the switch ``KEEPS_THINKING``."""
        self.answers = AnswerMemory(limit_bytes)
        self._keeps_thinking = keeps_thinking
        self._end_ids = tokenizer.eos_token_ids
        control = [text for text in tokenizer.control_tokens if text not in MARKS]
        self._control_ids = frozenset(i for text in control for i in tokenizer.encode(text)[:1])

    def restore(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
        tenant: Hashable,
        *,
        is_known: bool,
    ) -> RestoredChat:
        """Return the chat with the turns that were sampled for its answers. O(its size).

        With ``KEEPS_THINKING``, messages get the reasoning that their client dropped. ``is_known``:
        a secret identifies the ``tenant``.
        """
        keeps = (variables or {}).get(KEEPS_THINKING, self._keeps_thinking) is True
        if keeps:
            variables = {**(variables or {}), KEEPS_THINKING: True}
        chat = list(messages)
        sampled: dict[int, SampledTurn] = {}
        seen = None if is_known else hashlib.blake2b(digest_size=16)
        _see(seen, tools)
        for index, message in enumerate(chat):
            before = None if seen is None else seen.digest()
            _see(seen, [message.get("role"), *said_by(message)[:2]])
            turn = self.answers.find(tenant, index, message, keeps, before)
            if turn is not None:
                sampled[index] = turn
                if turn.reasoning and not message.get("reasoning_content"):
                    chat[index] = {**message, "reasoning_content": turn.reasoning}
        place = Place(tenant, len(chat), None if seen is None else seen.digest())
        return RestoredChat(chat, variables, sampled, keeps, place)

    def keep(
        self, header: str, place: Place, message: Mapping[str, Any], output: RequestOutput
    ) -> None:
        """Store the tokens of an answer, sent as ``message``, that a client can send back
        completely: one ended by the model or by its length limit. O(its size).

        ``header``: end of its prompt; see ``ChatPrompt``.
        """
        token_ids = output.output.tolist()
        if output.finish_reason == "stop" and token_ids[-1] in self._end_ids:
            token_ids.pop()
        elif output.finish_reason != "length":
            return
        if not header or not self._control_ids.isdisjoint(token_ids):
            return
        turn = SampledTurn(header, token_ids, message["reasoning_content"])
        self.answers.put(place.tenant, place.index, message, turn, place.chat)


def _see(seen: Any, value: Any) -> None:
    """Add ``value`` to a running digest, if there is one."""
    if seen is not None:
        seen.update(json.dumps(value, default=repr).encode())
