"""A proxy that passes every request on unchanged, and writes those that a cache could serve."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from engine.plugins.record.chats import Chats
from engine.plugins.record.trace_writer import Recorded, TraceWriter
from engine.server.api_errors import APIError, PlainJSON

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

RECORDED = ("/chat/completions", "/completions", "/messages", "/responses")
"""Ends of the paths of recorded requests."""
CONNECTION = frozenset(
    b"connection host keep-alive proxy-connection te trailer transfer-encoding upgrade".split()
)
"""Headers that belong to one connection and are not passed on."""
ENCODING = frozenset((b"content-encoding", b"content-length"))
"""Headers of an answer that are wrong after it is decoded."""
logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Exchange:
    """A request that is recorded, and its answer so far."""

    place: int
    seconds: float
    path: str
    body: bytes
    status: int | None = None
    """HTTP status of the answer. None before the answer starts."""
    pieces: list[bytes] = field(default_factory=list)


class Recorder:
    """Writes exchanges when they end, in its own thread, in the order of their arrival."""

    def __init__(self, writer: TraceWriter) -> None:
        self._writer, self._chats = writer, Chats()
        self._began_s = time.monotonic()
        self._lock = threading.Lock()
        self._running: dict[Exchange, None] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trace")

    def begin(self, path: str, body: bytes) -> Exchange:
        """Start to record a request with this complete ``body``. O(1)."""
        seconds = time.monotonic() - self._began_s
        exchange = Exchange(self._writer.take_place(), seconds, path, body)
        with self._lock:
            self._running[exchange] = None
        return exchange

    def end(self, exchange: Exchange) -> None:
        """Write ``exchange`` if it was answered. Does nothing if it has already ended.

        An incomplete answer is written too, because its request was computed.
        """
        with self._lock:
            if exchange in self._running:
                del self._running[exchange]
                self._thread.submit(self._write, exchange)

    def finish(self) -> None:
        """End all running exchanges, and wait until they are written. May be called again."""
        for exchange in tuple(self._running):
            self.end(exchange)
        self._thread.shutdown()

    def _write(self, exchange: Exchange) -> None:
        recorded: Recorded | None = None
        try:
            if exchange.status is None:
                self._writer.skip("requests without an answer are not written")
            elif exchange.status == 200:
                recorded = self._read(exchange)
            self._writer.write(exchange.place, recorded)
        except Exception as error:
            logger.exception("A request could not be written. Its answer was passed on.")
            self._writer.skip(f"{type(error).__name__}: see the log")
        finally:
            self._writer.give_up(exchange.place)

    def _read(self, exchange: Exchange) -> Recorded | None:
        try:
            body = json.loads(exchange.body)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            self._writer.skip("bodies that are not JSON objects are not written")
            return None
        read = self._chats.read(exchange.path, body, b"".join(exchange.pieces))
        return Recorded(exchange.seconds, *read)


class Proxy:
    """ASGI application in front of the server at ``upstream``."""

    def __init__(self, upstream: str, recorder: Recorder) -> None:
        self._url, self.recorder = httpx.URL(upstream), recorder
        # httpx has a pool of 100 connections by default, and further requests wait without limit.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        self._client = httpx.AsyncClient(timeout=None, limits=limits)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        """Run from the startup of the server to its shutdown."""
        await receive()
        async with self._client:
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await asyncio.to_thread(self.recorder.finish)
        await send({"type": "lifespan.shutdown.complete"})

    async def _serve(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request, while its client is connected."""
        body = bytearray()
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        else:
            return  # The client has disconnected.
        passing = asyncio.ensure_future(self._pass_on(scope, bytes(body), send))
        leaving = asyncio.ensure_future(_client_gone(receive))
        with suppress(asyncio.CancelledError):  # The server stops.
            await asyncio.wait((passing, leaving), return_when=asyncio.FIRST_COMPLETED)
        for task in (passing, leaving):
            task.cancel()
        await asyncio.wait((passing, leaving))
        if not passing.cancelled():
            passing.result()

    async def _pass_on(self, scope: Message, body: bytes, send: Send) -> None:
        path: str = scope["path"]
        is_recorded = scope["method"] == "POST" and path.endswith(RECORDED)
        exchange = self.recorder.begin(path, body) if is_recorded else None
        try:
            answer = await self._client.send(self._request(scope, body), stream=True)
        except httpx.LocalProtocolError as error:
            await _refuse(scope, send, 400, f"This request cannot be passed on ({error}).")
        except httpx.RequestError as error:
            message = f"The server at {self._url} does not answer ({error})."
            await _refuse(scope, send, 502, message)
        except asyncio.CancelledError:
            message = "The recording has ended: send requests to the server itself."
            await _refuse(scope, send, 503, message)
            raise
        else:
            if exchange is not None:
                exchange.status = answer.status_code
            try:
                await _answer(answer, exchange, send)
            finally:
                await answer.aclose()
        finally:
            if exchange is not None:
                self.recorder.end(exchange)

    def _request(self, scope: Message, body: bytes) -> httpx.Request:
        """Return the request for upstream, with path and query byte for byte.

        ``httpx.AsyncClient.build_request`` is not used: it would add cookies of other clients.
        """
        target = self._url.raw_path.rstrip(b"/") + scope["raw_path"]
        if scope["query_string"]:
            target += b"?" + scope["query_string"]
        skipped = CONNECTION | {b"content-length", b"accept-encoding"}
        headers = [(name, value) for name, value in scope["headers"] if name not in skipped]
        has_body = body or scope["method"] in ("POST", "PUT", "PATCH")
        return httpx.Request(
            scope["method"],
            self._url,
            headers=headers,
            content=body if has_body else None,
            extensions={"target": target},
        )


async def _answer(answer: httpx.Response, exchange: Exchange | None, send: Send) -> None:
    """Send ``answer`` as it arrives. An answer that is aborted upstream gets no end, so that
    clients see that it is incomplete."""
    skipped = CONNECTION | (ENCODING if "content-encoding" in answer.headers else frozenset())
    headers = [(name.lower(), value) for name, value in answer.headers.raw]
    kept = [pair for pair in headers if pair[0] not in skipped]
    start = {"type": "http.response.start", "status": answer.status_code, "headers": kept}
    await send(start)
    try:
        async for piece in answer.aiter_bytes():
            if exchange is not None:
                exchange.pieces.append(piece)
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    except httpx.RequestError as error:
        logger.warning("An answer ended early (%s).", error or type(error).__name__)
        return
    await send({"type": "http.response.body", "body": b""})


async def _refuse(scope: Message, send: Send, status: int, message: str) -> None:
    """Answer with an error in the form of the API of the path."""
    answer = PlainJSON(APIError(status, message).body(scope["path"]), status)
    await send({"type": "http.response.start", "status": status, "headers": answer.raw_headers})
    await send({"type": "http.response.body", "body": answer.body})


async def _client_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def create_proxy(upstream: str, writer: TraceWriter) -> Proxy:
    """Return the application in front of the server at ``upstream``."""
    return Proxy(upstream, Recorder(writer))
