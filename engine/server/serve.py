"""The server process: connections of clients, memory, start and stop.

At the limit of connections, an unused one is closed for a new one: the one without a request for
the longest time, or one with a stalled request body. So clients that hold unused connections cannot
lock others out.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import itertools
import json
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from engine.async_engine import AsyncEngine
from engine.errors import EngineStopped
from engine.server import access
from engine.server.access import Operator
from engine.server.api_errors import APIError
from engine.server.app import create_app
from engine.server.request_log import set_up_logging
from engine.server.settings import ACCEPTED_AT_ONCE, BACKLOG, SWITCH_S, ServerConfig
from hybridcache.geometry.units import counted

logger = logging.getLogger(__name__)
RESERVED = 64
"""Number of descriptors reserved for the rest of the process."""
FEWEST = 8
"""Minimum number of allowed connections."""
NEW_S, STALLED_S = 0.5, 5.0
"""Seconds after which a connection without a request, and one with an incomplete body, are closed
first."""
UNREAD_S = 120.0
"""Seconds that a client may read nothing of a waiting answer before its connection is closed. Until
then the rest of the answer is computed and kept in memory."""
MOST_DESCRIPTORS = 1 << 16
"""Upper limit to which the number of descriptors is raised, if the system allows it."""


def raise_descriptor_limit() -> None:
    """Raise the process's limit of descriptors to its hard limit, at most ``MOST_DESCRIPTORS``."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def most_connections() -> int:
    """Return the number of connections for which descriptors are free."""
    try:
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        num_used = len(os.listdir("/proc/self/fd"))
    except (ImportError, OSError):
        return MOST_DESCRIPTORS
    limit = MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
    return max(limit - num_used - RESERVED, FEWEST)


class Connections:
    """All connections of one server. Belongs to its event loop."""

    def __init__(self, limit: int, header_timeout_s: float) -> None:
        """Allow ``limit`` open connections. The headers of a request must be complete
        ``header_timeout_s`` after the connection was made, or after the last answer."""
        self._limit = limit
        self._header_timeout_s = header_timeout_s
        self._busy: dict[ClientConnection, float] = {}
        """Start times of connections with a request, oldest first."""
        self._waiting: dict[ClientConnection, float] = {}
        """Start times of connections without a request, oldest first."""
        self._unread: dict[ClientConnection, float] = {}
        """Times since when connections take no more bytes, oldest first."""

    def protocol(self, **how: Any) -> ClientConnection:
        """Make the protocol of a new connection for uvicorn."""
        return ClientConnection(self, **how)

    @property
    def num_busy(self) -> int:
        """Number of connections with a request."""
        return len(self._busy)

    @property
    def has_room(self) -> bool:
        return len(self._busy) + len(self._waiting) < self._limit

    def wait(self, connection: ClientConnection) -> None:
        """Record that ``connection`` has no request, or its request has ended."""
        self._busy.pop(connection, None)
        self._waiting[connection] = asyncio.get_running_loop().time()

    def begin(self, connection: ClientConnection) -> None:
        """Record that a request has begun."""
        if self._waiting.pop(connection, None) is not None:
            self._busy[connection] = asyncio.get_running_loop().time()

    def stall(self, connection: ClientConnection) -> None:
        """Record that ``connection`` takes no more bytes."""
        self._unread[connection] = asyncio.get_running_loop().time()

    def flow(self, connection: ClientConnection) -> None:
        """Record that ``connection`` takes bytes again."""
        self._unread.pop(connection, None)

    def remove(self, connection: ClientConnection) -> None:
        self._unread.pop(connection, None)
        self._waiting.pop(connection, None)
        self._busy.pop(connection, None)

    def make_room(self) -> bool:
        """Close a connection without a complete request. Returns False if there is none.
        O(connections)."""
        now_s = asyncio.get_running_loop().time()
        receiving = {one: since_s for one, since_s in self._busy.items() if one.is_receiving}
        for candidates, least_s in (
            (self._waiting, NEW_S),
            (receiving, STALLED_S),
            (self._waiting, 0.0),
            (receiving, 0.0),
        ):
            oldest, since_s = next(iter(candidates.items()), (None, now_s))
            if oldest is not None and now_s - since_s >= least_s:
                oldest.turn_away(_too_many())
                return True
        return False

    def sweep(self) -> None:
        """Close the connections with late headers, and those with an answer that is not read."""
        for connection in _older(self._waiting, self._header_timeout_s):
            connection.turn_away(
                APIError(408, "The headers of the request did not arrive in time: send it again.")
            )
        for connection in _older(self._unread, UNREAD_S):
            logger.warning("A client read nothing for %g s; its connection is closed.", UNREAD_S)
            connection.transport.abort()  # closing would wait for the client


def _older(since: dict[ClientConnection, float], age_s: float) -> list[ClientConnection]:
    """Return the connections in ``since``, oldest first, that are there for ``age_s``."""
    latest_s = asyncio.get_running_loop().time() - age_s
    return [*itertools.takewhile(lambda one: since[one] <= latest_s, since)]


class ClientConnection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """One connection that reports the begin and end of its requests to ``Connections``."""

    def __init__(self, connections: Connections, **how: Any) -> None:
        super().__init__(**how)
        self._all = connections
        self._has_begun = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        has_room = self._all.has_room or self._all.make_room()
        self._all.wait(self)
        if not has_room:
            self._has_begun = True
            self.turn_away(_too_many())

    def data_received(self, data: bytes) -> None:
        self._has_begun = True
        super().data_received(data)
        if self._has_request:
            self._all.begin(self)

    def on_response_complete(self) -> None:
        self._has_begun = False
        self._all.wait(self)
        super().on_response_complete()
        if self._has_request:  # the next request was already sent
            self._all.begin(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._all.stall(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._all.flow(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.remove(self)
        super().connection_lost(exc)

    @property
    def _has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def is_receiving(self) -> bool:
        """True if the body of its request is incomplete."""
        return self._has_request and self.cycle.more_body and not self.cycle.response_started

    def turn_away(self, error: APIError) -> None:
        """Close the connection, with an error response if a request had begun."""
        self._all.remove(self)
        if self.transport.is_closing():
            return
        if self._has_begun:
            self.transport.write(_response(error))
        self.transport.close()


def _too_many() -> APIError:
    return APIError(
        503,
        "The server has reached its limit of connections: try again later.",
        code="too_many_connections",
        headers={"Retry-After": "1"},
    )


def _response(error: APIError) -> bytes:
    """Return ``error`` as a response that ends its connection."""
    body = json.dumps(error.body()).encode()
    phrase = {408: "Request Timeout", 503: "Service Unavailable"}[error.status]
    headers = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **(error.headers or {}),
    }
    lines = [f"HTTP/1.1 {error.status} {phrase}", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


TRIM_S = 30
"""Interval between two calls of ``trim``."""


def _trimmer() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None  # not glibc


_malloc_trim = _trimmer()


async def trim() -> None:
    """Return free pages inside malloc's arenas to the system.

    Long-lived allocations between freed ones otherwise keep these pages. Takes up to a millisecond
    per 100 MiB. Does nothing without glibc.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)


FAREWELL_S = 5
"""Time after the drain in which clients can read that their answer was cut off."""


class Server(uvicorn.Server):
    """Ends unfinished requests ``drain_s`` after the stop signal, or at a second one, with an error
    that gives the reason."""

    def __init__(
        self,
        engine: AsyncEngine,
        config: ServerConfig,
        must_end: Callable[[], bool] = lambda: False,
    ) -> None:
        """``must_end`` is called ten times per second; True ends the server."""
        app = create_app(engine, config)
        limit = min(config.max_connections or MOST_DESCRIPTORS, most_connections())
        self._connections = Connections(limit, config.header_timeout_s)
        super().__init__(
            uvicorn.Config(
                app,
                http=self._connections.protocol,  # type: ignore[arg-type]
                ws="none",
                log_level=config.log_level,
                access_log=False,
                backlog=ACCEPTED_AT_ONCE,
                timeout_graceful_shutdown=math.ceil(config.drain_s) + FAREWELL_S,
                callback_notify=trim,
                timeout_notify=TRIM_S,
            )
        )
        self._engine = engine
        self._extensions = app.state.extensions
        self._drain_s = config.drain_s
        self._must_end = must_end
        self._hurry: Callable[[], object] | None = None
        """Ends the drain; None before it begins."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, or end the drain: requests that are left get an error instead of being dropped."""
        self.should_exit = True
        if self._hurry is not None:
            self._hurry()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)

    async def on_tick(self, counter: int) -> bool:
        self._connections.sweep()
        return await super().on_tick(counter) or self._must_end()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._extensions.close()
        ending = asyncio.create_task(self._end())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end(self) -> None:
        """Stop serving other engines at once, and all requests after ``drain_s``, or at a second
        signal."""
        if self._engine.failure is not None:
            logger.warning("Stopping: the engine has ended. %s", self._engine.failure)
        elif num_left := self._connections.num_busy:
            logger.warning(
                "Stopping: new requests are refused; %s may run for %g s more (--drain-s), or "
                "until a second signal.",
                counted(num_left, "request"),
                self._drain_s,
            )
        else:
            logger.warning("Stopping: no request is running.")
        began_s, loop = time.monotonic(), asyncio.get_running_loop()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._drain_s) as drain:

                def end_drain() -> None:
                    if not drain.expired():
                        drain.reschedule(loop.time())

                self._hurry = partial(loop.call_soon_threadsafe, end_drain)
                with suppress(EngineStopped):
                    await self._engine.stop_accepting()
                await asyncio.Event().wait()
        if num_left := self._connections.num_busy:
            logger.warning(
                "%s had not ended after %.1f s and %s broken off.",
                counted(num_left, "request"),
                time.monotonic() - began_s,
                "was" if num_left == 1 else "were",
            )
        await asyncio.to_thread(self._engine.stop)


def check(config: ServerConfig) -> None:
    """Raise ValueError if a file in the settings cannot be used. ``serve`` checks the same, but
    only after the model was loaded."""
    access.api_keys(config, os.environ)
    Operator.of(config)


def serve(
    engine: AsyncEngine,
    config: ServerConfig,
    listener: socket.socket,
    must_end: Callable[[], bool] = lambda: False,
) -> None:
    """Serve on ``listener`` until SIGTERM, SIGINT or ``must_end``; then finish running requests,
    for at most ``drain_s``."""
    # A signal may arrive before uvicorn handles signals, and uvicorn raises its own signals again
    # after the shutdown. A drained server must exit normally.
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: told.append(number))
    set_up_logging(config.log_level)
    sys.setswitchinterval(SWITCH_S)
    raise_descriptor_limit()
    # Objects made at the start stay alive. Freezing them saves the garbage collector a quarter of a
    # second per run.
    gc.collect()
    gc.freeze()
    Server(engine, config, lambda: bool(told) or must_end()).run(sockets=[listener])
