"""The server process: connections of clients, memory, start and stop.

uvicorn limits the size of headers and closes idle connections. Late headers and too many
connections are refused here.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
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
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from engine.async_engine import AsyncEngine
from engine.errors import EngineStopped
from engine.server.access import ServerKeys
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
MOST_DESCRIPTORS = 1 << 16
"""Upper limit to which the number of descriptors is raised, if the system allows it."""
GC_THRESHOLDS = (50_000, 20, 1000)
"""Objects of a long body would start full collections, each of which stops all clients. Reference
counts free nearly everything."""


def most_connections() -> int:
    """Return the number of connections for which descriptors are free, after the limit of
    descriptors was raised to its hard limit, at most ``MOST_DESCRIPTORS``."""
    try:
        import resource

        unlimited = resource.RLIM_INFINITY
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = MOST_DESCRIPTORS if hard == unlimited else min(hard, MOST_DESCRIPTORS)
        if soft != unlimited and soft < wanted:
            soft = wanted
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        num_used = len(os.listdir("/proc/self/fd"))
    except (ImportError, OSError):  # Not Linux.
        return MOST_DESCRIPTORS
    limit = MOST_DESCRIPTORS if soft == unlimited else soft
    return max(limit - num_used - RESERVED, FEWEST)


class ClientConnection(H11Protocol):
    """Connection of a client, closed if the headers of a request do not arrive in time."""

    header_timeout_s = 10.0
    _deadline: asyncio.TimerHandle | None = None
    _has_begun = False
    """True if a part of the next request has arrived."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        self._has_begun = True
        super().data_received(data)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._deadline is not None:
            self._deadline.cancel()

    def _wait_for_headers(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._has_begun = False
        self._deadline = self.loop.call_later(self.header_timeout_s, self._refuse_late_headers)

    def _refuse_late_headers(self) -> None:
        has_request = self.cycle is not None and not self.cycle.response_complete
        if has_request or self.transport.is_closing():
            return
        if self._has_begun:
            self.transport.write(LATE_HEADERS)
        self.transport.close()


LATE_HEADERS = (
    b"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
    + json.dumps(
        APIError(408, "The headers of the request did not arrive in time: send it again.").body()
    ).encode()
)


TRIM_S = 30
"""Interval between two calls of ``trim``."""
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""Function of glibc, or None with another library."""


async def trim() -> None:
    """Return free pages inside malloc's arenas to the system.

    Long-lived allocations between freed ones otherwise keep these pages. Takes up to a millisecond
    per 100 MiB.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)


WARNING_EVERY_S = 10.0
"""Minimum interval between two warnings about too many connections."""
BUSY_HEADERS = {"Retry-After": "1", "Connection": "close"}
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
        self.app = create_app(engine, config)
        self._most = min(config.max_connections or MOST_DESCRIPTORS, most_connections())
        limits = {"header_timeout_s": config.header_timeout_s}
        super().__init__(
            uvicorn.Config(
                self._serve_one,
                interface="asgi3",
                http=type("LimitedConnection", (ClientConnection,), limits),
                timeout_keep_alive=math.ceil(config.header_timeout_s),
                ws="none",
                log_config=None,
                log_level=config.log_level,
                access_log=False,
                backlog=ACCEPTED_AT_ONCE,
                timeout_graceful_shutdown=math.ceil(config.drain_s) + FAREWELL_S,
                callback_notify=trim,
                timeout_notify=TRIM_S,
            )
        )
        self._engine, self._page = engine, self.app.state.page
        self._drain_s = config.drain_s
        self._must_end = must_end
        self._hurry: Callable[[], object] | None = None
        """Ends the drain; None before it begins."""
        self._next_warning_s = 0.0

    async def _serve_one(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, with 503 if too many connections are open. ``/health`` is answered
        anyway, so that a busy server is not restarted."""
        is_full = len(self.server_state.connections) > self._most
        if not is_full or scope["type"] != "http" or scope["path"] == "/health":
            await self.app(scope, receive, send)
            return
        message = f"More than {self._most} connections are open (--max-connections)"
        if time.monotonic() >= self._next_warning_s:
            self._next_warning_s = time.monotonic() + WARNING_EVERY_S
            logger.warning("%s: requests on further ones are answered with 503.", message)
        refusal = APIError(503, f"{message}: send it again later.", headers=BUSY_HEADERS)
        await refusal.response(scope)(scope, receive, send)

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
        return await super().on_tick(counter) or self._must_end()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._page.close()
        ending = asyncio.create_task(self._end())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end(self) -> None:
        """Stop serving other engines at once, and all requests after ``drain_s``, or at a second
        signal."""
        if self._engine.failure is not None:
            logger.warning("Stopping: the engine has ended.")  # The command prints the reason.
        elif num_left := len(self.server_state.tasks):
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
        if num_left := len(self.server_state.tasks):
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
    ServerKeys.of(config)


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
    # Objects made at the start stay alive. Freezing them saves the garbage collector a quarter of a
    # second per run.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    Server(engine, config, lambda: bool(told) or must_end()).run(sockets=[listener])
