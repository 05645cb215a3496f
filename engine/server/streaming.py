"""Streaming over HTTP: merged outputs of several choices, server-sent events, and client
disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Mapping,
    Sequence,
)
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from engine.async_engine import RequestStream
from engine.server.api_errors import APIError, of_failure
from engine.server.request_log import note_error
from engine.text.json_text import write_json
from engine.text.outputs import RequestOutput

Result = TypeVar("Result")
Item = TypeVar("Item")
DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client disconnected before its answer was ready."""


def event(data: dict[str, Any]) -> bytes:
    """Return one server-sent event."""
    return b"data: " + write_json(data).encode() + b"\n\n"


def as_event(failure: APIError) -> bytes:
    """Return a failure in the middle of a stream in the form of OpenAI's clients."""
    return event(failure.body())


def named_event(data: dict[str, Any]) -> bytes:
    """Return one server-sent event named after its ``type``."""
    return b"event: " + str(data["type"]).encode() + b"\n" + event(data)


async def with_pauses(items: AsyncIterator[Item], pause_s: float) -> AsyncIterator[Item | None]:
    """Yield ``items``, and None whenever none arrived for ``pause_s``."""
    waiting = asyncio.ensure_future(anext(items))
    try:
        while True:
            done, _ = await asyncio.wait((waiting,), timeout=pause_s)
            if not done:
                yield None
                continue
            try:
                item = waiting.result()
            except StopAsyncIteration:
                return
            waiting = asyncio.ensure_future(anext(items))
            yield item
    finally:
        waiting.cancel()
        with suppress(asyncio.CancelledError, StopAsyncIteration, Exception):
            await waiting
        close: Callable[[], Awaitable[None]] | None = getattr(items, "aclose", None)
        if close is not None:
            await close()


async def interleave(
    streams: Sequence[RequestStream],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Yield (index of the stream, output) until all have ended. All requests are ended when the
    iterator is closed."""
    outputs: asyncio.Queue[tuple[int, RequestOutput] | BaseException | None] = asyncio.Queue()

    async def forward(index: int, stream: RequestStream) -> None:
        try:
            async for output in stream:
                outputs.put_nowait((index, output))
        except Exception as error:
            outputs.put_nowait(error)
        else:
            outputs.put_nowait(None)

    tasks = [asyncio.create_task(forward(*pair)) for pair in enumerate(streams)]
    num_open = len(tasks)
    try:
        while num_open:
            item = await outputs.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        for stream in streams:
            stream.abort()


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Return the result of ``work``. If the client disconnects, cancel it and raise ClientGone."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_hang_up(request.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await working


class EventStream(StreamingResponse):
    """Server-sent events that stop, and close their iterator, when the client disconnects, even
    between events."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        late_headers: Callable[[], Mapping[str, str]] | None = None,
        on_error: Callable[[APIError], bytes] | None = None,
    ) -> None:
        """Prepare a response. With ``on_error`` it starts with the first event.

        An earlier error is raised and gets its own status; a later one is written by ``on_error``
        as the last event. ``late_headers`` is called when the first event is available.
        """
        self._late_headers, self._on_error = late_headers, on_error
        super().__init__(
            _one_at_a_time(events), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        self._events = events

    async def stream_response(self, send: Send) -> None:
        if self._on_error is not None:
            rest = aiter(self.body_iterator)
            first = [one async for one in _head(rest)]
            if self._late_headers is not None:
                self.headers.update(self._late_headers())
            self.body_iterator = _joined(first, rest, self._on_error)
        await super().stream_response(send)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self.stream_response(send))
        leaving = asyncio.ensure_future(_hang_up(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                with suppress(OSError):  # The client disconnected during a send.
                    sending.result()
        finally:
            leaving.cancel()
            sending.cancel()
            with suppress(asyncio.CancelledError, Exception):  # already raised above
                await sending
            close: Callable[[], Awaitable[None]] | None = getattr(self._events, "aclose", None)
            if close is not None:
                await close()


async def _one_at_a_time(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield ``events``, and give the event loop a turn after each. Otherwise a burst is written to
    a closed connection, and asyncio logs a warning."""
    async for one in events:
        yield one
        await asyncio.sleep(0)


async def _head(events: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Yield the first event only."""
    async for one in events:
        yield one
        return


async def _joined(
    first: Sequence[Any], rest: AsyncIterator[Any], on_error: Callable[[APIError], bytes]
) -> AsyncIterator[Any]:
    for one in first:
        yield one
    try:
        async for one in rest:
            yield one
    except Exception as error:
        failure = of_failure(error)
        note_error(str(failure))
        yield on_error(failure)


async def _hang_up(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass
