"""The proxy: passes every request on as it is, and writes those that a cache could have served."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from engine.record.chats import Chats
from engine.record.trace import Recorded, TraceWriter

RECORDED = ("/chat/completions", "/completions", "/messages", "/responses")
"""How the paths end whose requests are written."""
HOP_BY_HOP = frozenset(
    {
        "accept-encoding",
        "connection",
        "content-encoding",
        "content-length",
        "host",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Headers that are one connection's own, or that the body no longer fits."""
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"]
logger = logging.getLogger(__name__)


def create_proxy(upstream: str, writer: TraceWriter) -> Starlette:
    """The application that stands in front of the server at ``upstream``."""
    client = httpx.AsyncClient(base_url=upstream, timeout=None)
    began_s, chats = time.monotonic(), Chats()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    async def forward(request: Request) -> Response:
        raw = await request.body()
        arrived_s = time.monotonic() - began_s
        headers = [(k, v) for k, v in request.headers.items() if k.lower() not in HOP_BY_HOP]
        passed_on = client.build_request(
            request.method,
            httpx.URL(path=request.url.path, query=request.url.query.encode()),
            headers=headers,
            content=raw,
        )
        try:
            answer = await client.send(passed_on, stream=True)
        except httpx.TransportError as error:
            message = f"The server at {upstream} does not answer ({error})."
            return JSONResponse({"error": {"message": message}}, 502)
        is_recorded = request.method == "POST" and request.url.path.endswith(RECORDED)
        body = _body(raw) if is_recorded else None
        pieces: list[bytes] = []

        async def stream() -> AsyncIterator[bytes]:
            async for piece in answer.aiter_bytes():
                if body is not None:
                    pieces.append(piece)
                yield piece

        async def end() -> None:
            await answer.aclose()
            if body is not None and answer.status_code == 200:
                with _whatever_comes():
                    read = chats.read(request.url.path, body, b"".join(pieces))
                    writer.write(Recorded(arrived_s, *read))

        kept = {k: v for k, v in answer.headers.items() if k.lower() not in HOP_BY_HOP}
        return StreamingResponse(stream(), answer.status_code, kept, background=BackgroundTask(end))

    return Starlette(routes=[Route("/{path:path}", forward, methods=METHODS)], lifespan=lifespan)


@contextmanager
def _whatever_comes() -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, AttributeError, KeyError, IndexError):
        logger.exception("A request could not be written; it was answered all the same.")


def _body(raw: bytes) -> dict[str, Any] | None:
    try:
        body = json.loads(raw)
    except ValueError:
        return None
    return body if isinstance(body, dict) else None
