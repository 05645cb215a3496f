"""Bodies of requests, decoded within limits, and of answers, also as streams of events.

``msgspec`` holds the interpreter while it decodes a body and converts its fields to their types.
The number of bytes and of values is therefore limited, and long bodies are decoded in a thread. The
engine runs in its own process: its steps do not wait for this interpreter.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.server.api_errors import APIError, note_error, of_failure, quoted, short
from engine.server.settings import ServerConfig
from engine.text.bounded import read_json

LONG = 4096
"""Bytes, characters or tokens above which work is done in a thread."""
_threads = ThreadPoolExecutor(2, thread_name_prefix="server")
"""Threads for long work, which does not delay short work."""
MAX_NODES = 100_000
"""Maximum names, lists and objects of a JSON text: decoding holds the interpreter for 50 ms."""
UNMARKED = bytes(set(range(256)) - set(b'[{:"'))
"""Bytes that begin no list, object or text, and end no name."""

Result = TypeVar("Result")


async def run(size: int, work: Callable[[], Result]) -> Result:
    """Run ``work`` directly if its ``size`` is small, else in a thread, and return its result."""
    if size <= LONG:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_threads, work)


class Part(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Object of a fixed form inside a body. Unknown names are refused unless they are null."""


class Body(Part, kw_only=True):
    """Base of all bodies."""

    NEUTRAL: ClassVar[Mapping[str, Collection[Any] | None]] = {}
    """Parameters that are not supported -> values without effect, or None if all have none."""
    KINDS: ClassVar[Mapping[str, str]] = {}
    """Lists of objects -> type of entries that do not name one."""

    model: str | None = None
    cache_salt: str | None = None
    """Requests with different salts share neither cache entries nor stored responses."""


Kind = TypeVar("Kind", bound=Body)


def decode(kind: type[Kind], raw: bytes) -> Kind:
    """Return the body ``raw`` as ``kind``; lone surrogates become U+FFFD. Raises APIError 400 with
    one sentence about the first fault. O(its size)."""
    try:
        text = raw.decode()
        check_nodes(raw)
        given = read_json(text)
        if not isinstance(given, dict):
            raise ValueError("it has no names and values between { and }")
    except ValueError as error:
        raise APIError(400, f"The body cannot be read ({error}): send one JSON object.") from None
    given = settled(given)
    for name in [*given]:
        if name in kind.NEUTRAL:
            value, allowed = given.pop(name), kind.NEUTRAL[name]
            if allowed is not None and value not in allowed:
                raise APIError(400, f"'{name}' is not supported: omit it.")
    for name, usual in kind.KINDS.items():
        if isinstance(entries := given.get(name), list):
            given[name] = [{"type": usual} | e if isinstance(e, dict) else e for e in entries]
    return converted(given, kind)


def check_nodes(raw: bytes) -> None:
    """Raise ValueError for a JSON text with many values. O(its length)."""
    if num_nodes(raw) > MAX_NODES:
        raise ValueError(f"it has more than {MAX_NODES:,} names, lists and objects")


def num_nodes(raw: bytes) -> int:
    """Return the number of names, lists and objects of a JSON text, in a few short calls."""
    plain = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    marks = plain.translate(None, UNMARKED).replace(b'""', b"")
    return len(b"".join(marks.split(b'"')[::2]))  # Without the pieces inside texts.


FREE = {
    *("arguments", "chat_template_kwargs", "input", "input_schema"),
    *("json", "parameters", "schema"),
}
"""Names of objects of any form, such as JSON schemas and arguments of calls."""


def settled(value: Any) -> Any:
    """Return the JSON ``value`` without nulls, which mean the default everywhere in these APIs, and
    with 3 in place of 3.0. Objects of any form stay as they are. O(its size)."""
    if isinstance(value, dict):
        return {
            name: entry if name in FREE and isinstance(entry, dict) else settled(entry)
            for name, entry in value.items()
            if entry is not None
        }
    if isinstance(value, list):
        is_plain = {*map(type, value)}.isdisjoint((dict, list, float))
        return value if is_plain else [*map(settled, value)]
    is_whole = isinstance(value, float) and abs(value) <= 2**53 and value.is_integer()
    return int(value) if is_whole else value


def converted(value: Any, of_type: type[Result], place: str = "") -> Result:
    """Return the settled JSON ``value`` at this ``place`` of a body as ``of_type``. Raises APIError
    400 with one sentence about the first fault."""
    try:
        return msgspec.convert(value, of_type, str_keys=True)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ValueError):
            raise APIError(400, str(error.__cause__)) from None
        text, _, at = str(error).replace("`", "").partition(" - at ")
    what = "A name in " if at.startswith("key") else "A value of " if at.endswith("[...]") else ""
    path = at.rpartition("$")[2].removesuffix("[...]")
    param, code = (place + re.sub(r"\[(\d+)\]", r".\1", path)), None
    if found := re.fullmatch(r"Object (missing required|contains unknown) field (.*)", text):
        param += f".{found[2]}"
        said = "is missing: add it"
        if found[1] == "contains unknown":
            said, code = "is not a parameter: check its spelling or drop it", "unknown_parameter"
    else:
        said = re.sub("Invalid (enum )?value", "cannot be", text.replace("Expected ", "must be "))
        said = f"{short(said, 120)}: see /openapi.json"
    param = param.removeprefix(".")
    raise APIError(400, f"{what}{quoted(param)} {said}.", param=param, code=code)


class ClientGone(APIError):
    """The client disconnected before its answer was ready. The log shows it."""

    def __init__(self) -> None:
        super().__init__(499, "The client has disconnected.")


async def read_body(request: Request, kind: type[Kind], config: ServerConfig) -> tuple[Kind, int]:
    """Return the body of ``request`` as ``kind``, and its size in bytes. Raises APIError 400, 408
    (too slow) or 413 (too large)."""
    try:
        async with asyncio.timeout(config.body_timeout_s):
            raw = await _receive(request, config.max_body_mib)
    except TimeoutError:
        raise APIError(408, "The body did not arrive in time: send it again.") from None
    except ClientDisconnect:
        raise ClientGone from None
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if not re.fullmatch(r"application/(.*\+)?json", content_type):
        # Foreign web pages cannot set this header without permission, so they cannot post to a
        # server on localhost.
        raise APIError(
            400,
            "The body needs the header Content-Type: application/json. "
            "With curl, add -H 'Content-Type: application/json'.",
        )
    return await run(len(raw), partial(decode, kind, raw)), len(raw)


async def _receive(request: Request, max_mib: float) -> bytes:
    pieces, num_left = list[bytes](), int(max_mib * 2**20)
    if int(request.headers.get("content-length", 0)) <= num_left:
        async for piece in request.stream():
            pieces.append(piece)
            num_left -= len(piece)
            if num_left < 0:
                break
        else:
            return b"".join(pieces)
    message = f"The body is larger than {max_mib:g} MiB: send less, or raise --max-body-mib."
    raise APIError(413, message)


def json_response(value: Any) -> Response:
    """Return ``value`` as a response. O(its size)."""
    return Response(msgspec.json.encode(value), media_type="application/json")


DONE = b"data: [DONE]\n\n"
PAUSE = b": waiting\n\n"
"""Comment, which readers of server-sent events skip."""
QUIET_S = 5.0
"""Seconds of silence between two events that are filled."""


def event(data: Any, name: str | None = None) -> bytes:
    """Return one server-sent event. O(its size)."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + msgspec.json.encode(data) + b"\n\n"


def named_event(data: Mapping[str, Any]) -> bytes:
    """Return one server-sent event named after its ``type``."""
    return event(data, data["type"])


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


async def _hang_up(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events that close their iterator when the client disconnects, even between
    events. Silence is filled, so that proxies do not close the stream."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        late_headers: Callable[[], Mapping[str, str]] = dict,
        on_error: Callable[[APIError], bytes] = lambda failure: event(failure.body()),
        keep_alive_s: float | None = None,
    ) -> None:
        """Prepare a response. It starts with the first event, or after ``keep_alive_s`` with a
        comment. Another one follows each silence of ``QUIET_S``, or ``keep_alive_s``.

        An earlier error is raised and gets its own status; a later one is written by ``on_error``
        as the last event. ``late_headers`` is called when the first event is available.
        """
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._late_headers, self._on_error = events, late_headers, on_error
        self._keep_alive_s = keep_alive_s
        self._has_begun = self._is_sending = False
        self._sent_s = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        filler = asyncio.create_task(self._fill_pauses(send))
        try:
            with suppress(OSError, ClientGone):  # OSError: the client left during a send.
                await unless_gone(receive, self._send_all(scope, send))
        finally:
            filler.cancel()
            await self._events.aclose()

    async def _send_all(self, scope: Scope, send: Send) -> None:
        try:
            async for event in self._events:
                if not self._has_begun:
                    self.headers.update(self._late_headers())
                await self._send(send, event)
        except Exception as error:
            if not self._has_begun or isinstance(error, OSError):
                raise
            failure = of_failure(error)
            note_error(scope, failure)
            await self._send(send, self._on_error(failure))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _fill_pauses(self, send: Send) -> None:
        pause_s = self._keep_alive_s or QUIET_S
        while True:
            await asyncio.sleep(max(self._sent_s + pause_s - time.monotonic(), 0.01))
            if self._is_sending or time.monotonic() < self._sent_s + pause_s:
                continue
            self._sent_s = time.monotonic()
            if self._has_begun or self._keep_alive_s is not None:
                with suppress(OSError):  # Also of a timeout. The sender of events finds out.
                    await self._send(send, PAUSE)

    async def _send(self, send: Send, piece: bytes) -> None:
        """Send a piece, after the headers, and give the event loop a turn. Otherwise a burst is
        written to a closed connection, and asyncio logs a warning."""
        self._is_sending = True
        if not self._has_begun:
            self._has_begun = True
            headers = self.raw_headers
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": piece, "more_body": True})
        await asyncio.sleep(0)
        self._is_sending, self._sent_s = False, time.monotonic()
