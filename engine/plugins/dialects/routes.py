"""The paths of the dialects beside OpenAI's chats."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response

from engine.plugins.dialects.anthropic import count_tokens, messages
from engine.plugins.dialects.anthropic_body import CountRequest, MessagesRequest
from engine.plugins.dialects.response_store import ResponseStore
from engine.plugins.dialects.responses import Responses
from engine.plugins.dialects.responses_body import ResponsesRequest
from engine.server.body import BodyReader
from engine.server.context import ServingContext
from engine.server.schemas import described


def add_responses(
    app: FastAPI, front: ServingContext, reader: BodyReader, store: ResponseStore
) -> None:
    """OpenAI's paths for conversations that the server holds."""
    responses = Responses(front, store)

    @app.post("/v1/responses", openapi_extra=described(ResponsesRequest))
    async def _create(request: Request) -> Response:
        return await responses.create(request, await reader.read(request, ResponsesRequest))

    @app.get("/v1/responses/{response_id}")
    async def _retrieve(request: Request, response_id: str) -> Response:
        return await responses.retrieve(request, response_id)

    @app.delete("/v1/responses/{response_id}")
    async def _delete(request: Request, response_id: str) -> dict[str, Any]:
        return await responses.delete(request, response_id)


def add_messages(app: FastAPI, front: ServingContext, reader: BodyReader) -> None:
    """Anthropic's paths."""

    @app.post("/v1/messages", openapi_extra=described(MessagesRequest))
    async def _messages(request: Request) -> Response:
        return await messages(front, request, await reader.read(request, MessagesRequest))

    @app.post("/v1/messages/count_tokens", openapi_extra=described(CountRequest))
    async def _count_tokens(request: Request) -> Response:
        return await count_tokens(front, request, await reader.read(request, CountRequest))
