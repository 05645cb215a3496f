"""Transport of requests and answers: connections of clients, and streams of events."""

from __future__ import annotations

import asyncio
import re
import time
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress

import h11
import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from engine.front.server.bodies import APIError, ClientGone, Result, of_failure

# --- Connections ----------------------------------------------------------------------------------

HEADERS_S = 10.0
"""Time from the start of a connection, or the end of an answer, to the end of the next headers."""


MALFORMED = re.compile(rb"(?<!\r)\n|\n[ \t]")
"""Bare line feed, or a folded header. Proxies may read either as another request than h11 does."""


UNREAD_S = 120.0
"""Seconds that a client may read nothing of a waiting answer before the answer is broken off."""


class Wire(h11.Connection):
    """Connection that refuses what h11 only tolerates in the headers of a request."""

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        if self.their_state is h11.IDLE:
            head = self.trailing_data[0].partition(b"\r\n\r\n")[0]
            if MALFORMED.search(head):
                raise h11.RemoteProtocolError("a bare line feed, or a folded header")
        return super().next_event()


class ClientConnection(H11Protocol):
    """Connection of a client, closed if the headers of a request do not arrive in time, or if the
    client reads nothing of an answer for ``UNREAD_S``."""

    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.conn, self.app_state = Wire(h11.SERVER), {**self.app_state, "connection": self}
        self._wait_for_headers()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait_for_headers()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def _watch_reader(self, unread: int = -1) -> None:
        """Close the connection if as many bytes are still unread, else look again later."""
        size = self.transport.get_write_buffer_size()
        if size == unread:
            self.transport.abort()
        else:
            self._unread = self.loop.call_later(UNREAD_S, self._watch_reader, size)

    def _wait_for_headers(self) -> None:
        wait_s = HEADERS_S if self.cycle is None else self.timeout_keep_alive
        self.loop.call_later(wait_s, self._close_if_late, self.cycle)

    def _close_if_late(self, previous: RequestResponseCycle | None) -> None:
        # The next request may have arrived before the end of the previous answer.
        is_answering = previous is not None and not previous.response_complete
        if self.cycle is previous and not is_answering and not self.transport.is_closing():
            self.transport.close()


# --- Streams of events ----------------------------------------------------------------------------

DONE = b"data: [DONE]\n\n"
PAUSE = b": waiting\n\n"
"""Comment, which readers of server-sent events skip."""
QUIET_S = 5.0
"""Seconds of silence between two events that are filled."""


def event(data: object, name: str | None = None) -> bytes:
    """Return one server-sent event. O(its size)."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + msgspec.json.encode(data) + b"\n\n"


async def unless_gone(receive: Receive, work: Awaitable[Result]) -> Result:
    """Return the result of ``work``. If the client disconnects, cancel it and raise ClientGone."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_hang_up(receive))
    try:
        await asyncio.wait((working, leaving), return_when=FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await working


async def _hang_up(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


class SentEvents(Response):
    """Server-sent events that close their iterator when the client disconnects, even between
    events. Silence is filled, so that proxies do not close the stream."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        on_error: Callable[[APIError], bytes] = lambda failure: event(failure.body()),
        keep_alive_s: float | None = None,
        pause: Callable[[], bytes] = lambda: PAUSE,
    ) -> None:
        """Prepare a response. It starts with the first event, or after ``keep_alive_s`` with a
        comment, or the event that ``pause`` makes. Another one follows each silence of ``QUIET_S``,
        or ``keep_alive_s``. An earlier error is raised; a later one is written by ``on_error`` as
        the last event. ``events`` may set headers before the first one."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._on_error = events, on_error
        self._keep_alive_s, self._pause = keep_alive_s, pause
        self._has_begun = False
        self._sent_s = time.monotonic()
        self._connection: ClientConnection | None = None

    @property
    def is_ready(self) -> bool:
        """True if ``write`` can be called while the events are awaited: the answer has chunks, and
        the client reads it."""
        if (own := self._connection) is None or own.cycle.scope["http_version"] != "1.1":
            return False
        is_lost = own.cycle.disconnected or own.transport.is_closing()
        return not (is_lost or own.flow.write_paused)

    def write(self, piece: bytes) -> None:
        """Write an event at once, in place of one of the iterator, in a tenth of its time."""
        assert self._connection is not None
        self._connection.transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        self._sent_s = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._connection = scope.get("state", {}).get("connection")
        leaving = asyncio.ensure_future(_hang_up(receive))
        try:
            with suppress(OSError, ClientGone):  # OSError: the client left during a send.
                try:
                    while (piece := await self._next(send, leaving)) is not None:
                        await self._send(send, piece)
                except Exception as error:
                    if not self._has_begun or isinstance(error, OSError | ClientGone):
                        raise
                    failure = of_failure(error)
                    scope.setdefault("state", {})["error"] = str(failure)
                    await self._send(send, self._on_error(failure))
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            leaving.cancel()
            await self._events.aclose()

    async def _next(self, send: Send, leaving: asyncio.Future[None]) -> bytes | None:
        """Return the next event, or None after the last one, and fill the silence before it. Raises
        ClientGone when ``leaving`` is done."""
        coming = asyncio.ensure_future(anext(self._events, None))
        pause_s = self._keep_alive_s or QUIET_S
        try:
            while True:
                left_s = max(self._sent_s + pause_s - time.monotonic(), 0)
                await asyncio.wait((coming, leaving), timeout=left_s, return_when=FIRST_COMPLETED)
                if leaving.done():
                    raise ClientGone
                if coming.done():
                    return coming.result()
                if time.monotonic() >= self._sent_s + pause_s:
                    self._sent_s = time.monotonic()
                    if self._has_begun or self._keep_alive_s is not None:
                        await self._send(send, self._pause())
        finally:
            coming.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await coming

    async def _send(self, send: Send, piece: bytes) -> None:
        """Send a piece, after the headers."""
        if not self._has_begun:
            self._has_begun = True
            headers = self.raw_headers
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": piece, "more_body": True})
        self._sent_s = time.monotonic()
