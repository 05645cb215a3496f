"""Replay of sampled answers, and the hooks of explanations of cache misses.

Replayed prompts keep the beginning of earlier ones: sampled tokens replace answers that come back,
and lines that change with every request are moved or dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from engine.plugins.diagnostics import DiagnosticsConfig
from engine.plugins.diagnostics.explain import SYSTEM_ROLES
from engine.plugins.diagnostics.explanations import Explanations
from engine.server.access import Operator, Tenant
from engine.server.api_errors import APIError, quoted
from engine.server.bodies import json_response
from engine.server.context import ChatInput, Message, ServingContext
from engine.server.settings import ServerConfig
from engine.text.chat_prompt import ChatPrompt
from engine.text.outputs import RequestOutput
from engine.text.replay import Place, Replay
from engine.text.tokenizer import Tokenizer

KEEPS_THINKING = "preserve_thinking"
"""Template variable of newer templates; emulated for templates that do not support it."""
logger = logging.getLogger(__name__)


class Hooks:
    """Hooks around every chat of one server; see ``ChatHooks``.

    They replace parts of a chat by the sampled tokens and stable lines of earlier requests, and
    store requests for explanations.
    """

    def __init__(self, tokenizer: Tokenizer, config: ServerConfig, grid: int) -> None:
        settings = config.of(DiagnosticsConfig)
        self._keeps_thinking = settings.preserve_thinking
        self._volatile = VolatileLines(settings)
        self.kept = self._volatile.without
        self.replay = Replay(tokenizer, int(settings.replay_mib * 2**20))
        self.explanations = Explanations(tokenizer, int(settings.explain_mib * 2**20), grid)
        self.diagnose = self.explanations.diagnose

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
        chat = self._volatile.settle(messages)
        sampled, place = self.replay.find(
            chat,
            tools,
            tenant,
            is_known=tenant.is_known,
            keeps_thinking=keeps,
            stable=self._volatile.without,
        )
        return ChatInput(chat, variables, sampled, keeps, place)

    def after_answer(
        self, prompt: ChatPrompt, place: Place, message: Message, output: RequestOutput
    ) -> None:
        """See ``Replay.keep``."""
        self.replay.keep(prompt.header, place, message, output)


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
        "answer. The request log also shows it."
    )
    if has_forgotten:
        message += " Older ones were evicted: raise --explain-mib to store more."
    return message


async def explanation(
    context: ServingContext, hooks: Hooks, operator: Operator, request: Request
) -> Response:
    """Explain the cache misses of an answer to the operator."""
    operator.check(request)
    if context.engine.config.prefix_cache == "none":
        raise APIError(404, "Nothing to explain: the prefix cache is off (--prefix-cache).")
    answer_id = request.path_params["answer_id"]
    compared_with = request.query_params.get("compared_with")
    told = hooks.explanations.look_up(answer_id, compared_with)
    if told is None:
        names = [answer_id] if compared_with is None else [answer_id, compared_with]
        unknown = [name for name in names if hooks.explanations.memory.find(name) is None]
        raise APIError(404, _why_unknown(unknown, hooks.explanations.memory.has_forgotten))
    return json_response(told)
