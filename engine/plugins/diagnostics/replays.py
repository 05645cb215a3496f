"""Prompts that keep the beginning of earlier ones: sampled tokens replace answers that come back,
and lines that change with every request are moved or dropped."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.plugins.diagnostics import DiagnosticsConfig
from engine.plugins.diagnostics.answers import AnswerMemory, said_by
from engine.plugins.diagnostics.outline import SYSTEM_ROLES
from engine.server.access import Tenant
from engine.server.chat_hooks import ChatInput, Message
from engine.text.answers import MARKS
from engine.text.chat_prompt import ChatPrompt, SampledTurn
from engine.text.outputs import RequestOutput
from engine.text.tokenizer import Tokenizer

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


class Replays:
    """Replaces parts of a chat by the sampled tokens and stable lines of earlier requests."""

    def __init__(self, tokenizer: Tokenizer, config: DiagnosticsConfig) -> None:
        self._tokenizer = tokenizer
        self._keeps_thinking = config.preserve_thinking
        self._volatile = VolatileLines(config)
        self.answers = AnswerMemory(int(config.replay_mib * 2**20))
        control = [text for text in tokenizer.control_tokens if text not in MARKS]
        self._control_ids = frozenset(i for text in control for i in tokenizer.encode(text)[:1])

    def prepare(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
        tenant: Tenant,
    ) -> ChatInput:
        """Return the inputs for rendering a chat. O(its size)."""
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

    def remember(
        self,
        prompt: ChatPrompt,
        place: Place,
        message: Message,
        output: RequestOutput,
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
