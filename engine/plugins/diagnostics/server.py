"""Replay of sampled answers, and explanations of cache misses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fastapi import FastAPI, Request

from engine.plugins.diagnostics import DiagnosticsConfig
from engine.plugins.diagnostics.explanations import Explanations, Inquiry
from engine.plugins.diagnostics.replays import Replays
from engine.server.access import Operator, Tenant
from engine.server.api_errors import APIError, quoted
from engine.server.context import ChatDiagnostics, ChatInput, Message, ServerExtension
from engine.server.settings import ServerConfig
from engine.text.chat_prompt import ChatPrompt
from engine.text.outputs import RequestOutput
from engine.text.tokenizer import Tokenizer


class Hooks:
    """Hooks around every chat of one server; see ``ChatHooks``."""

    def __init__(self, tokenizer: Tokenizer, config: ServerConfig, grid: int) -> None:
        settings = config.of(DiagnosticsConfig)
        self.replays = Replays(tokenizer, settings)
        self.explanations = Explanations(tokenizer, int(settings.explain_mib * 2**20), grid)

    def before_render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
        tenant: Tenant,
    ) -> ChatInput:
        """See ``ChatHooks``."""
        return self.replays.prepare(messages, tools, variables, tenant)

    def diagnose(
        self,
        answer_id: str,
        token_ids: np.ndarray,
        *,
        compared_with: str | None,
        is_asked: bool,
        **chat: Any,
    ) -> ChatDiagnostics:
        """See ``ChatHooks``."""
        tokens = token_ids.astype(np.int32, copy=False)
        asked = self.explanations.begin(answer_id, tokens, **chat)
        return Inquiry(self.explanations, asked, compared_with, is_asked)

    def after_answer(
        self, prompt: ChatPrompt, place: Any, message: Message, output: RequestOutput
    ) -> None:
        """See ``ChatHooks``."""
        self.replays.remember(prompt, place, message, output)


def _why_unknown(unknown: Sequence[str], has_forgotten: bool) -> str:
    """Return the reason why there is no explanation; ids in ``unknown`` are not stored."""
    if not unknown:
        return "The two answers have different salts (cache_salt): they share no cache entries."
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
        """See ``ServerExtension``."""
        hooks = self.context.chats
        assert isinstance(hooks, Hooks)

        @app.get("/v1/cache/explanations/{answer_id}")
        async def explanation(
            request: Request, answer_id: str, compared_with: str | None = None
        ) -> dict[str, Any]:
            operator.check(request)
            told = hooks.explanations.look_up(answer_id, compared_with)
            if told is None:
                names = [answer_id] if compared_with is None else [answer_id, compared_with]
                unknown = [name for name in names if hooks.explanations.memory.find(name) is None]
                raise APIError(404, _why_unknown(unknown, hooks.explanations.memory.has_forgotten))
            return told
