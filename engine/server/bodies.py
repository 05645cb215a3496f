"""Bodies of requests, read within limits, and of answers, also as streams of events. Neither delays
other clients.

A body is counted before it is parsed, and its lists before they are validated. An error is one
sentence about the first fault.

Long work is done by ``Workers`` in threads, and JSON is read and written by ``msgspec``. The engine
runs in its own process, so its steps do not wait for this interpreter.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Mapping,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.server.api_errors import APIError, of_failure, of_validation
from engine.server.request_log import note_error
from engine.server.schemas import Strict
from engine.server.settings import ServerConfig, flag
from engine.text.json_text import JSONValueError, read_json, write_json

LONG = 4096
"""Threshold above which work is done in a thread: bytes of a body, characters of a text or tokens
of an answer."""
NUM_WORKERS = 2

Result = TypeVar("Result")


class Workers:
    """A few threads for long work. Short work is not delayed by it."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="server")
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammars")

    async def compile(self, work: Callable[[], Result]) -> Result:
        """Run ``work`` in a separate thread for grammars, so that grammars do not delay long
        bodies."""
        return await asyncio.get_running_loop().run_in_executor(self._compiler, work)

    async def run(self, size: int, work: Callable[[], Result]) -> Result:
        """Run ``work`` directly if its ``size`` is small, else in a thread, and return its
        result."""
        if size <= LONG:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        for threads in (self._threads, self._compiler):
            threads.shutdown(wait=False, cancel_futures=True)


PIECE = 1024
"""Number of escapes of one string that are scanned at a time."""
QUOTE = ord('"')
COMMAS, NAMES = b",", b":[{"
"""Characters that are counted before a body is parsed. A value costs little; a name, a list or an
object costs ten times as much."""

Body = TypeVar("Body", bound=Strict)
_INSIDE = re.compile(rb'(?:[^"\\]++|\\.?){0,%d}+' % PIECE, re.DOTALL)
_NOT_JSON = (
    "The body is not valid UTF-8 JSON, or has a number that is too long: send one JSON object."
)
_NO_OBJECT = "The body must be one JSON object, with names and values between { and }."
_NO_HEADER = (
    "The body needs the header Content-Type: application/json. "
    "With curl, add -H 'Content-Type: application/json'."
)


class BodyReader:
    """Reads the bodies of one server, within its limits."""

    def __init__(self, config: ServerConfig, workers: Workers) -> None:
        self._config = config
        self._workers = workers

    async def read(self, request: Request, kind: type[Body]) -> Body:
        """Return the body of ``request`` as ``kind``.

        Raises APIError 400 for an invalid body or one beyond a limit, and 408 if it does not arrive
        in time.
        """
        try:
            raw = await asyncio.wait_for(request.body(), self._config.body_timeout_s)
        except TimeoutError:
            raise APIError(408, "The body did not arrive in time: send it again.") from None
        except ClientDisconnect:
            raise ClientGone from None
        content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
        is_json = content_type == "application/json" or (
            content_type.startswith("application/") and content_type.endswith("+json")
        )
        return await self._workers.run(len(raw), lambda: self._parse(raw, is_json, kind))

    def _parse(self, raw: bytes, is_json: bool, kind: type[Body]) -> Body:
        if not raw:
            raise APIError(400, "The body is empty. Send one JSON object.")
        if not is_json:
            # Foreign web pages cannot set this header without permission, so they cannot post to a
            # server on localhost.
            raise APIError(400, _NO_HEADER)
        self._check_marks(raw, kind)
        try:
            body = read_json(raw.decode())
        except json.JSONDecodeError as error:
            place = f"line {error.lineno}, column {error.colno}"
            reason = f"The body is not valid JSON ({error.msg}, {place}): send one JSON object."
            raise APIError(400, reason) from None
        except JSONValueError as error:
            raise APIError(400, f"The body cannot be read: {error}.") from None
        except ValueError:
            raise APIError(400, _NOT_JSON) from None
        if not isinstance(body, dict):
            raise APIError(400, _NO_OBJECT)
        self._check_lists(body)
        try:
            return kind.model_validate(body)
        except ValidationError as error:
            names = [field.alias or name for name, field in kind.model_fields.items()]
            raise of_validation(error, body, names) from None

    def _check_marks(self, raw: bytes, kind: type[Body]) -> None:
        """Refuse bodies that would take long to parse. Without token ids, a list of values is
        walked through more than once, so the lower limit applies."""
        limits = self._config
        max_texts = limits.max_values + limits.max_names + 2
        for setting, marks, what in (
            ("max_values" if kind.HOLDS_IDS else "max_names", COMMAS, "commas"),
            ("max_names", NAMES, "colons and opening brackets"),
        ):
            limit = getattr(limits, setting)
            if _num_marks(raw, marks, limit, max_texts) > limit:
                raise APIError(
                    400,
                    f"The body has more than {limit} {what}: send fewer, or raise {flag(setting)}.",
                )

    def _check_lists(self, body: dict[str, Any]) -> None:
        """Refuse lists longer than a setting allows. O(messages + prompts)."""
        prompt, messages = body.get("prompt"), body.get("messages")
        if isinstance(prompt, list):
            num_ids = sum(len(part) if isinstance(part, list) else 1 for part in prompt)
            self._check("max_prompt_ids", num_ids, "token ids or prompts", "prompt")
        if isinstance(tokens := body.get("tokens"), list):
            self._check("max_detokenize_ids", len(tokens), "token ids", "tokens")
        for name, entries in (("messages", messages), ("input", body.get("input"))):
            if isinstance(entries, list):
                self._check("max_messages", len(entries), "messages", name)
                contents = (entry.get("content") for entry in entries if isinstance(entry, dict))
                num_parts = sum(len(content) for content in contents if isinstance(content, list))
                self._check("max_parts", num_parts, "text parts", name)
                self._check_arguments(entries, name)
        allowed, num_choices = body.get("allowed_token_ids"), body.get("n")
        if isinstance(allowed, list):
            num_ids = len(allowed) * (num_choices if isinstance(num_choices, int) else 1)
            self._check("max_prompt_ids", num_ids, "token ids in all choices", "allowed_token_ids")
        for name in ("stop", "stop_sequences", "stop_token_ids", "bad_words"):
            if isinstance(stops := body.get(name), list):
                self._check("max_stops", len(stops), "of them", name)
            for text in stops if isinstance(stops, list) else (stops,):
                if isinstance(text, str):
                    self._check("max_stop_chars", len(text), "characters in a string", name)

    def _check_arguments(self, entries: list[Any], name: str) -> None:
        """Refuse calls with long arguments, which are JSON inside strings. O(its bytes)."""
        limit, num = self._config.max_names, 0
        for text in _arguments(entries):
            num += _num_marks(text.encode("utf-8", "replace"), NAMES + COMMAS, limit, limit + 2)
            if num > limit:
                raise APIError(
                    400,
                    f"The calls in '{name}' have more than {limit} commas, colons and opening "
                    f"brackets in their arguments: send fewer, or raise {flag('max_names')}.",
                    param=name,
                )

    def _check(self, setting: str, number: int, of_what: str, param: str) -> None:
        limit = getattr(self._config, setting)
        if number > limit:
            raise APIError(
                400,
                f"'{param}' has {number} {of_what}, more than {limit}: "
                f"send fewer, or raise {flag(setting)}.",
                param=param,
            )


def _arguments(entries: list[Any]) -> Iterator[str]:
    """Yield the arguments of calls in messages (OpenAI's chats) or items (its responses)."""
    for entry in entries:
        calls = entry.get("tool_calls") if isinstance(entry, dict) else None
        made = [call.get("function") for call in _objects(calls)]
        for holder in _objects([entry, *made]):
            if isinstance(text := holder.get("arguments"), str):
                yield text


def _objects(entries: Any) -> list[dict[str, Any]]:
    found = entries if isinstance(entries, list) else []
    return [entry for entry in found if isinstance(entry, dict)]


def _num_marks(raw: bytes, marks: bytes, limit: int, max_texts: int) -> int:
    """Count ``marks`` in a JSON text, up to ``limit`` or ``max_texts`` strings.

    A text with more strings is not valid JSON. Marks inside strings are only subtracted if the
    total exceeds ``limit``. O(bytes), without creating objects.
    """
    num = sum(raw.count(mark) for mark in marks)
    if num <= limit:
        return num
    num = end = 0
    for _ in range(max_texts):
        start = raw.find(b'"', end)
        num += sum(raw.count(mark, end, start if start >= 0 else None) for mark in marks)
        if num > limit or start < 0:
            return num
        end = _end_of_text(raw, start + 1)
    return num


def _end_of_text(raw: bytes, position: int) -> int:
    """Return the end of the string around ``position``, or the end of the text if it is not
    closed."""
    while True:
        found = _INSIDE.match(raw, position)
        assert found is not None, "it also matches the empty text"
        position = found.end()
        if position == len(raw):
            return position
        if raw[position] == QUOTE:
            return position + 1


class BodyLimit:
    """ASGI middleware that answers 413 to bodies above ``max_bytes``, with or without a
    Content-Length."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if int(announced) > self._max_bytes:
            await self._refusal().response(scope)(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                # An HTTPException, because FastAPI turns other errors during the reading of a body
                # into 400.
                raise HTTPException(413, str(self._refusal()))
            return message

        await self._app(scope, counted, send)

    def _refusal(self) -> APIError:
        limit = self._max_bytes / 2**20
        return APIError(
            413, f"The body is larger than {limit:g} MiB: send less, or raise --max-body-mib."
        )


def to_json(value: Any) -> bytes:
    """Return ``value`` as JSON. O(its size)."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:  # A lone surrogate.
        return write_json(value, compact=True).encode()


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


async def unless_gone(receive: Receive, work: Awaitable[Result]) -> Result:
    """Return the result of ``work``. If the client disconnects, cancel it and raise ClientGone."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_hang_up(receive))
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


PAUSE = b": waiting\n\n"
"""Comment, which readers of server-sent events skip."""


class EventStream(StreamingResponse):
    """Server-sent events that stop, and close their iterator, when the client disconnects, even
    between events."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        late_headers: Callable[[], Mapping[str, str]] | None = None,
        on_error: Callable[[APIError], bytes] | None = None,
        pause_s: float | None = None,
    ) -> None:
        """Prepare a response. With ``on_error`` it starts with the first event, or after
        ``pause_s`` with a comment. Another comment follows each such pause.

        An earlier error is raised and gets its own status; a later one is written by ``on_error``
        as the last event. ``late_headers`` is called when the first event is available.
        """
        self._late_headers, self._on_error, self._pause_s = late_headers, on_error, pause_s
        super().__init__(
            _one_at_a_time(events), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        self._events = events

    async def stream_response(self, send: Send) -> None:
        if self._on_error is not None:
            rest: AsyncIterator[Any] = aiter(self.body_iterator)
            if self._pause_s is not None:
                rest = with_pauses(rest, self._pause_s)
            first = await anext(rest, b"")
            if self._late_headers is not None and first is not None:
                self.headers.update(self._late_headers())
            self.body_iterator = _joined(first, rest, self._on_error)
        await super().stream_response(send)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(OSError, ClientGone):  # OSError: the client left during a send.
                await unless_gone(receive, self.stream_response(send))
        finally:
            close: Callable[[], Awaitable[None]] | None = getattr(self._events, "aclose", None)
            if close is not None:
                await close()


async def _one_at_a_time(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield ``events``, and give the event loop a turn after each. Otherwise a burst is written to
    a closed connection, and asyncio logs a warning."""
    async for one in events:
        yield one
        await asyncio.sleep(0)


async def _joined(
    first: Any, rest: AsyncIterator[Any], on_error: Callable[[APIError], bytes]
) -> AsyncIterator[Any]:
    yield PAUSE if first is None else first
    try:
        async for one in rest:
            yield PAUSE if one is None else one
    except Exception as error:
        failure = of_failure(error)
        note_error(str(failure))
        yield on_error(failure)


async def _hang_up(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass
