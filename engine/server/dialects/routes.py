"""The paths of the dialects beside OpenAI's chats."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response

from engine.server.body import BodyReader
from engine.server.dialects.messages import count_tokens, messages
from engine.server.dialects.messages_body import CountRequest, MessagesRequest
from engine.server.front import ServingContext
from engine.server.schemas import described


def add_messages(app: FastAPI, front: ServingContext, reader: BodyReader) -> None:
    """Anthropic's paths."""

    @app.post("/v1/messages", openapi_extra=described(MessagesRequest))
    async def _messages(request: Request) -> Response:
        return await messages(front, request, await reader.read(request, MessagesRequest))

    @app.post("/v1/messages/count_tokens", openapi_extra=described(CountRequest))
    async def _count_tokens(request: Request) -> Response:
        return await count_tokens(front, request, await reader.read(request, CountRequest))
