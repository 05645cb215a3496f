"""From the bytes of a request to what its endpoint takes, at a cost that no client can make others
pay.

A body is counted before it is parsed, and its lists before they are checked: an error is one
sentence, found at the first thing that is wrong. Whatever is long is read in a thread (see
``Workers``), in steps that are each short, since a thread that holds the interpreter keeps
everybody waiting too.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from engine.server.config import ServerConfig, flag
from engine.server.errors import APIError, of_validation

LONG = 4096
"""Bytes of a body, characters of a text or tokens of an answer above which a thread does the
work."""
NUM_WORKERS = 2
SLICE = 1024
"""Entries of a list that are written as JSON at a time."""

COSTS = {"max_values": "commas", "max_names": "colons and opening brackets"}
"""What is counted before a body is parsed: a value costs little, a name, a list or an object ten
times as much."""

Body = TypeVar("Body", bound=BaseModel)
Result = TypeVar("Result")
_TEXTS = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_NOT_JSON = (
    "The body is not valid UTF-8 JSON, or nested too deep, or has too long a number: "
    "send one JSON object."
)
_NO_OBJECT = "The body must be one JSON object, with the header Content-Type: application/json."


class Workers:
    """A few threads for what would take the event loop too long. Long work waits for long work
    only."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="server")

    async def run(self, size: int, work: Callable[[], Result]) -> Result:
        """What ``work`` returns: done here where its ``size`` is small, else in a thread."""
        if size <= LONG:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class BodyReader:
    """Reads the bodies of one server, within its limits."""

    def __init__(self, config: ServerConfig, workers: Workers) -> None:
        self._config = config
        self._workers = workers

    async def read(self, request: Request, kind: type[Body]) -> Body:
        """The body of ``request`` as ``kind``. APIError 400: it is none, or past a limit; 408: it
        did not come in time."""
        try:
            raw = await asyncio.wait_for(request.body(), self._config.body_timeout_s)
        except TimeoutError:
            raise APIError(408, "The body did not arrive in time: send it again.") from None
        content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
        is_json = content_type == "application/json" or (
            content_type.startswith("application/") and content_type.endswith("+json")
        )
        return await self._workers.run(len(raw), lambda: self._parse(raw, is_json, kind))

    def _parse(self, raw: bytes, is_json: bool, kind: type[Body]) -> Body:
        if not raw:
            raise APIError(400, "The body is empty: send one JSON object.")
        if not is_json:
            # Foreign web pages can not set the header without asking: they do not post to a server
            # on localhost.
            raise APIError(400, _NO_OBJECT)
        for setting, marks in (("max_values", b","), ("max_names", b":[{")):
            self._check(
                setting, _num_marks(raw, marks, getattr(self._config, setting)), COSTS[setting]
            )
        try:
            body = json.loads(raw.decode())
        except json.JSONDecodeError as error:
            reason = f"The body is not valid JSON ({error.msg}): send one JSON object."
            raise APIError(400, reason) from None
        except (ValueError, RecursionError):
            raise APIError(400, _NOT_JSON) from None
        if not isinstance(body, dict):
            raise APIError(400, _NO_OBJECT)
        self._check_lists(body)
        try:
            return kind.model_validate(body)
        except ValidationError as error:
            raise of_validation(error) from None

    def _check_lists(self, body: dict[str, Any]) -> None:
        """Refuse what is longer than a setting allows, whatever it holds. O(messages + prompts)."""
        prompt, messages, stop = (body.get(name) for name in ("prompt", "messages", "stop"))
        if isinstance(prompt, list):
            num_ids = sum(len(part) if isinstance(part, list) else 1 for part in prompt)
            self._check("max_prompt_ids", num_ids, "token ids or prompts", "prompt")
        if isinstance(tokens := body.get("tokens"), list):
            self._check("max_detokenize_ids", len(tokens), "token ids", "tokens")
        if isinstance(messages, list):
            self._check("max_messages", len(messages), "messages", "messages")
            contents = (entry.get("content") for entry in messages if isinstance(entry, dict))
            num_parts = sum(len(content) for content in contents if isinstance(content, list))
            self._check("max_parts", num_parts, "text parts", "messages")
        for name in ("stop", "stop_token_ids"):
            if isinstance(stops := body.get(name), list):
                self._check("max_stops", len(stops), "of them", name)
        for text in stop if isinstance(stop, list) else (stop,):
            if isinstance(text, str):
                self._check("max_stop_chars", len(text), "characters in a string", "stop")

    def _check(self, setting: str, number: int, of_what: str, param: str | None = None) -> None:
        limit = getattr(self._config, setting)
        if number > limit:
            where = "The body" if param is None else f"'{param}'"
            raise APIError(
                400,
                f"{where} has {number} {of_what}, more than {limit}: "
                f"send fewer, or raise {flag(setting)}.",
                param=param,
            )


def _num_marks(raw: bytes, marks: bytes, limit: int) -> int:
    """How many of ``marks`` a JSON text has. Those inside its strings count too, unless they alone
    would pass ``limit``. O(bytes), without making an object of any."""
    num = sum(raw.count(mark) for mark in marks)
    return num if num <= limit else sum(_TEXTS.sub(b"", raw).count(mark) for mark in marks)


def to_json(value: Any) -> bytes:
    """``value`` as JSON, long lists in slices, so that no step of it is long. O(its size)."""
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
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
