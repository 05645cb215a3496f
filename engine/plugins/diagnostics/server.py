"""Replay of sampled answers, and the hooks of explanations of cache misses.

Replayed prompts keep the beginning of earlier ones: sampled tokens replace answers that come back,
and lines that change with every request are moved or dropped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from array import array
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request

from engine.plugins.diagnostics import DiagnosticsConfig
from engine.plugins.diagnostics.explain import SYSTEM_ROLES
from engine.plugins.diagnostics.explanations import Explanations, said_by
from engine.server.access import Operator, Tenant
from engine.server.api_errors import APIError, quoted
from engine.server.context import ChatInput, Message, ServerExtension
from engine.server.settings import ServerConfig
from engine.text.answers import MARKS
from engine.text.bounded_memory import BoundedMemory
from engine.text.chat_prompt import ChatPrompt, SampledTurn
from engine.text.outputs import RequestOutput
from engine.text.tokenizer import Tokenizer

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


KEEPS_THINKING = "preserve_thinking"
"""Template variable of newer templates; emulated for templates that do not support it."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a chat."""

    tenant: Tenant
    index: int
    """Number of messages before it."""
    chat: bytes | None
    """Digest of the chat before it. None if a secret identifies the tenant: its answers may then be
    replaced with their reasoning at any place."""


class Hooks:
    """Hooks around every chat of one server; see ``ChatHooks``.

    They replace parts of a chat by the sampled tokens and stable lines of earlier requests, and
    store requests for explanations.
    """

    def __init__(self, tokenizer: Tokenizer, config: ServerConfig, grid: int) -> None:
        settings = config.of(DiagnosticsConfig)
        self._tokenizer = tokenizer
        self._keeps_thinking = settings.preserve_thinking
        self._volatile = VolatileLines(settings)
        self.kept = self._volatile.without
        self.answers = AnswerMemory(int(settings.replay_mib * 2**20))
        self.explanations = Explanations(tokenizer, int(settings.explain_mib * 2**20), grid)
        self.diagnose = self.explanations.diagnose
        control = [text for text in tokenizer.control_tokens if text not in MARKS]
        self._control_ids = frozenset(i for text in control for i in tokenizer.encode(text)[:1])

    def before_render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
        tenant: Tenant,
    ) -> ChatInput:
        """See ``ChatHooks``."""
        keeps = (variables or {}).get(KEEPS_THINKING, self._keeps_thinking) is True
        if keeps:
            variables = {**(variables or {}), KEEPS_THINKING: True}
        chat, sampled = self._volatile.settle(messages), {}
        seen = None if tenant.is_known else hashlib.blake2b(digest_size=16)
        _see(seen, tools)
        for index, message in enumerate(chat):
            before = None if seen is None else seen.digest()
            _see(seen, [message.get("role"), *said_by(self._volatile.without(message))[:2]])
            turn = self.answers.find(tenant, index, message, keeps, before)
            if turn is not None:
                sampled[index] = turn
                if turn.reasoning and not message.get("reasoning_content"):
                    chat[index] = {**message, "reasoning_content": turn.reasoning}
        place = Place(tenant, len(chat), None if seen is None else seen.digest())
        return ChatInput(chat, variables, sampled, keeps, place)

    def after_answer(
        self, prompt: ChatPrompt, place: Place, message: Message, output: RequestOutput
    ) -> None:
        """Store the tokens of an answer, sent as ``message``, that a client can send back
        completely: one ended by the model or by its length limit. O(its size)."""
        token_ids = output.output.tolist()
        if output.finish_reason == "stop" and token_ids[-1] in self._tokenizer.eos_token_ids:
            token_ids.pop()
        elif output.finish_reason != "length":
            return
        if not prompt.header or not self._control_ids.isdisjoint(token_ids):
            return
        turn = SampledTurn(prompt.header, token_ids, message["reasoning_content"])
        self.answers.put(place.tenant, place.index, message, turn, place.chat)


def _see(seen: Any, value: Any) -> None:
    """Add ``value`` to a running digest, if there is one."""
    if seen is not None:
        seen.update(json.dumps(value, default=repr).encode())


class VolatileLines:
    """Lines of the system message that change with every request, so that the cache would not match
    after them."""

    def __init__(self, config: DiagnosticsConfig) -> None:
        self._drops = config.volatile == "drop"
        self._pattern, pattern = config.pattern, config.volatile_line
        if pattern is not None:
            done = "dropped from" if self._drops else "moved to the end of"
            logger.warning("Lines that match %r are %s the system message.", pattern, done)

    def without(self, message: Message) -> Message:
        """Return ``message`` without these lines, if it is a system message. O(its size)."""
        if self._pattern is None or message.get("role") not in SYSTEM_ROLES:
            return message
        lines = str(message.get("content") or "").split("\n")
        return {**message, "content": "\n".join(x for x in lines if not self._pattern.search(x))}

    def settle(self, messages: Sequence[Message]) -> list[Message]:
        """Return ``messages`` with these lines at the end of their system message, or without them.
        O(its size)."""
        chat = list(messages)
        if self._pattern is None:
            return chat
        for index, message in enumerate(chat):
            if message.get("role") not in SYSTEM_ROLES:
                break
            lines = str(message.get("content") or "").split("\n")
            moved = [line for line in lines if self._pattern.search(line)]
            if moved:
                kept = [line for line in lines if not self._pattern.search(line)]
                told = "dropped" if self._drops else "moved"
                logger.info("%d lines of message %d were %s.", len(moved), index, told)
                text = "\n".join(kept if self._drops else [*kept, *moved])
                chat[index] = {**message, "content": text}
        return chat


def _why_unknown(unknown: Sequence[str], has_forgotten: bool) -> str:
    """Return the reason why there is no explanation; ids in ``unknown`` are not stored."""
    if not unknown:
        return "The two answers have different salts (cache_salt): they share no cache entries."
    if unknown[0].startswith("cmpl"):
        return "Only chats are explained, not text completions: send the 'id' of a chat's answer."
    message = (
        f"No chat answer with the id {quoted(unknown[0])} is stored: send the 'id' of an "
        "answer. The request log and `engine top` also show it."
    )
    if has_forgotten:
        message += " Older ones were evicted: raise --explain-mib to store more."
    return message


class DiagnosticsExtension(ServerExtension):
    """Explains cache misses to the operator."""

    def add_routes(self, app: FastAPI, operator: Operator) -> None:
        hooks = self.context.chats
        assert isinstance(hooks, Hooks)

        @app.get("/v1/cache/explanations/{answer_id}")
        async def explanation(
            request: Request, answer_id: str, compared_with: str | None = None
        ) -> dict[str, Any]:
            operator.check(request)
            if self.context.engine.config.prefix_cache == "none":
                raise APIError(404, "Nothing to explain: the prefix cache is off (--prefix-cache).")
            told = hooks.explanations.look_up(answer_id, compared_with)
            if told is None:
                names = [answer_id] if compared_with is None else [answer_id, compared_with]
                unknown = [name for name in names if hooks.explanations.memory.find(name) is None]
                raise APIError(404, _why_unknown(unknown, hooks.explanations.memory.has_forgotten))
            return told
