"""The proxy: passes every request on as it is, and writes those that a cache could have served."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from engine.record.trace import Recorded, TraceWriter

RECORDED = ("/chat/completions", "/completions")
"""How the paths end whose requests are written."""
NOT_RECORDED = ("/messages", "/responses")
"""Those whose requests are prompts too, and can not be written."""
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
    began_s = time.monotonic()

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
        body = _body(raw) if request.url.path.endswith(RECORDED) else None
        pieces: list[bytes] = []

        async def stream() -> AsyncIterator[bytes]:
            async for piece in answer.aiter_bytes():
                if body is not None:
                    pieces.append(piece)
                yield piece

        async def end() -> None:
            await answer.aclose()
            is_answered = request.method == "POST" and answer.status_code == 200
            if is_answered and request.url.path.endswith(NOT_RECORDED):
                writer.skip(f"requests to {request.url.path} are not written")
            if body is not None and answer.status_code == 200:
                _write(writer, Recorded(arrived_s, body, read_answer(b"".join(pieces))))

        kept = {k: v for k, v in answer.headers.items() if k.lower() not in HOP_BY_HOP}
        return StreamingResponse(stream(), answer.status_code, kept, background=BackgroundTask(end))

    return Starlette(routes=[Route("/{path:path}", forward, methods=METHODS)], lifespan=lifespan)


def _write(writer: TraceWriter, recorded: Recorded) -> None:
    try:
        writer.write(recorded)
    except (TypeError, ValueError, AttributeError, KeyError):
        logger.exception("A request could not be written; it was answered all the same.")


def _body(raw: bytes) -> dict[str, Any] | None:
    try:
        body = json.loads(raw)
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


def read_answer(raw: bytes) -> dict[str, Any]:
    """The first choice of an answer, whole or in events, as a message of the assistant."""
    text = raw.decode("utf-8", "replace")
    if not text.lstrip().startswith("data:") and "\ndata:" not in text:
        choice = _choice(json.loads(text))
        return {"role": "assistant", "content": choice.get("text"), **(choice.get("message") or {})}
    content: list[str] = []
    calls: dict[int, dict[str, Any]] = {}
    for line in text.splitlines():
        if not line.startswith("data:") or line[5:].strip() == "[DONE]":
            continue
        choice = _choice(json.loads(line[5:]))
        delta = choice.get("delta") or {}
        content.append(delta.get("content") or choice.get("text") or "")
        for call in delta.get("tool_calls") or ():
            known = calls.setdefault(call.get("index", 0), {"name": "", "arguments": ""})
            for name in known:
                known[name] += (call.get("function") or {}).get(name) or ""
    message: dict[str, Any] = {"role": "assistant", "content": "".join(content)}
    listed = [{"type": "function", "function": calls[index]} for index in sorted(calls)]
    return message | ({"tool_calls": listed} if listed else {})


def _choice(answer: Any) -> dict[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    first = [one for one in choices or () if one.get("index", 0) == 0]
    return first[0] if first else {}
