"""Parsing of request bodies within limits, without delays for other clients.

A body is counted before it is parsed, and its lists before they are validated. An error is one
sentence about the first fault. Long bodies are read by ``Workers`` in short steps.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.server.api_errors import APIError, of_validation
from engine.server.schemas import Strict
from engine.server.settings import ServerConfig, flag
from engine.server.streaming import ClientGone
from engine.server.workers import Workers, give_way
from engine.text.json_text import JSONValueError, read_json, write_json

SLICE = 256
"""Number of list entries that are written as JSON at a time."""
PIECE = 1024
"""Number of strings of a body, or escapes of one string, that are scanned at a time."""
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
            body = read_json(raw.decode(), give_way)
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
            raise of_validation(error, body) from None

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
        for name in ("stop", "stop_sequences", "stop_token_ids"):
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
    for number in range(max_texts):
        start = raw.find(b'"', end)
        num += sum(raw.count(mark, end, start if start >= 0 else None) for mark in marks)
        if num > limit or start < 0:
            return num
        end = _end_of_text(raw, start + 1)
        if number % PIECE == 0:
            give_way()
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
        give_way()


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
    """Return ``value`` as JSON. Long lists are written in slices, so that each step is short. O(its
    size)."""
    return "".join(_pieces(value)).encode()


def _pieces(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        before = "{"
        for name, entry in value.items():
            yield f"{before}{_dumps(name)}:"
            yield from _pieces(entry)
            before = ","
        yield "}" if value else "{}"
    elif isinstance(value, list) and len(value) > SLICE:
        for start in range(0, len(value), SLICE):
            if start:
                give_way()
            yield ("," if start else "[") + _dumps(value[start : start + SLICE])[1:-1]
        yield "]"
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield "," if index else "["
            yield from _pieces(entry)
        yield "]" if value else "[]"
    else:
        yield _dumps(value)


def _dumps(value: Any) -> str:
    return write_json(value, compact=True)
