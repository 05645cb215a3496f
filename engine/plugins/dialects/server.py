"""Anthropic's messages, OpenAI's responses, and paths of vLLM's and SGLang's clients."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response

from engine.plugins.dialects import DialectsConfig
from engine.plugins.dialects.anthropic import count_tokens, messages
from engine.plugins.dialects.anthropic_body import CountRequest, MessagesRequest
from engine.plugins.dialects.responses import Responses
from engine.plugins.dialects.responses_body import ResponsesRequest
from engine.plugins.dialects.tokens import add_facts, detokenize, tokenize
from engine.server.access import Operator
from engine.server.context import Dialect, ServerExtension, ServingContext
from engine.server.schemas import DetokenizeRequest, TokenizeRequest
from engine.server.settings import ServerConfig


class DialectsExtension(ServerExtension):
    """Serves chats in two more dialects, and tokenization."""

    def __init__(self, context: ServingContext, config: ServerConfig) -> None:
        super().__init__(context, config)
        limit_bytes = int(config.of(DialectsConfig).responses_mib * 2**20)
        self._responses = Responses(context, limit_bytes)

    def dialects(self) -> Iterator[Dialect]:
        answer, count = partial(messages, self.context), partial(count_tokens, self.context)
        create = self._responses.create
        yield Dialect("/v1/messages", MessagesRequest, answer, "_messages")
        yield Dialect("/v1/messages/count_tokens", CountRequest, count, "_count_tokens")
        yield Dialect("/v1/responses", ResponsesRequest, create, "_create")
        to_tokens = partial(tokenize, self.context, self.config.max_prompt_ids)
        yield Dialect("/tokenize", TokenizeRequest, to_tokens, "tokenize")
        to_text = partial(detokenize, self.context)
        yield Dialect("/detokenize", DetokenizeRequest, to_text, "detokenize")

    def add_routes(self, app: FastAPI, operator: Operator) -> None:
        """Add the paths of stored conversations, and of facts about the server."""
        add_facts(app, self.context)

        @app.get("/v1/responses/{response_id}")
        async def _retrieve(request: Request, response_id: str) -> Response:
            return await self._responses.retrieve(request, response_id)

        @app.delete("/v1/responses/{response_id}")
        async def _delete(request: Request, response_id: str) -> dict[str, Any]:
            return await self._responses.delete(request, response_id)
