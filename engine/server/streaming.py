"""From the engine's streams to HTTP: several choices as one sequence, server-sent events, and
clients that hang up."""

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
from engine.server.errors import APIError, of_failure
from engine.text.json_text import write_json
from engine.text.outputs import RequestOutput

Result = TypeVar("Result")
Item = TypeVar("Item")
DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client hung up before its answer was ready."""


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + write_json(data).encode() + b"\n\n"


def as_event(failure: APIError) -> bytes:
    """Write a failure as OpenAI's clients read it in the middle of a stream."""
    return event(failure.body())


def named_event(data: dict[str, Any]) -> bytes:
    """One server-sent event that is called what its ``type`` says."""
    return b"event: " + str(data["type"]).encode() + b"\n" + event(data)


async def with_pauses(items: AsyncIterator[Item], pause_s: float) -> AsyncIterator[Item | None]:
    """``items``, and None whenever none came for ``pause_s``."""
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
    """(index of the stream, output) as they come, until all ended. However it is left, no request
    stays behind."""
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
    """The result of ``work``, which is cancelled as soon as the client hangs up: ClientGone."""
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
    """Server-sent events that stop, and close their iterator, when the client hangs up: also while
    none is due."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        late_headers: Callable[[], Mapping[str, str]] | None = None,
        on_error: Callable[[APIError], bytes] | None = None,
    ) -> None:
        """With ``on_error`` the answer begins with its first event: an error before it is raised
        and has a status of its own, and one after it is written by ``on_error`` as the last event.
        ``late_headers`` are asked for when the first event is there."""
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
                with suppress(OSError):  # The client left while something was being sent.
                    sending.result()
        finally:
            leaving.cancel()
            sending.cancel()
            with suppress(asyncio.CancelledError, Exception):  # it was raised above
                await sending
            close: Callable[[], Awaitable[None]] | None = getattr(self._events, "aclose", None)
            if close is not None:
                await close()


async def _one_at_a_time(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The event loop has a turn between two: else a burst is written to a connection that is gone,
    and asyncio complains."""
    async for one in events:
        yield one
        await asyncio.sleep(0)


async def _head(events: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The first event alone."""
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
        yield on_error(of_failure(error))


async def _hang_up(receive: Receive) -> None:
    """Returns when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
