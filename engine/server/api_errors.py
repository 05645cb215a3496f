"""Error responses in the form of each dialect, with one sentence on how to correct the request."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from itertools import zip_longest
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Scope

from engine.errors import (
    ContextOverflow,
    DuplicateId,
    EngineStopped,
    InvalidRequest,
    QueueFull,
    RequestError,
)
from engine.server.request_log import note_error
from engine.text.json_text import whole_text, write_json
from hybridcache.geometry.units import counted

logger = logging.getLogger(__name__)
MAX_QUOTED, MAX_MESSAGE = 60, 280
"""Maximum length of a quotation from the request, and of the whole message."""
ANTHROPIC = "/v1/messages"
"""Prefix of the paths that answer in Anthropic's form."""
ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    502: "api_error",
    503: "overloaded_error",
}
REFUSALS: dict[str, tuple[int, str | None]] = {
    InvalidRequest.kind: (400, None),
    ContextOverflow.kind: (400, "context_length_exceeded"),
    DuplicateId.kind: (409, "duplicate_request_id"),
    QueueFull.kind: (429, "queue_full"),
    EngineStopped.kind: (503, "stopped"),
}
"""Status and code of each kind of ``RequestError``; any other kind is a failure of the engine."""
RETRY_AFTER_S = {QueueFull.kind: 1, EngineStopped.kind: 10}
EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_attributes_type": "an object",
    "model_type": "an object",
    "string_pattern_mismatch": "a token id",
    "string_too_short": "text that is not empty",
    "string_type": "text",
    "string_unicode": "text that has a UTF-8 form",
    "union_tag_not_found": "an object with a 'type'",
}
"""Description of the expected value by the type of pydantic's error."""
SERVER_FAILED = "The server failed on this request; see its log for the reason."
KINDS = {404: "not_found_error", 429: "rate_limit_error"} | dict.fromkeys(
    (500, 502, 503), "server_error"
)


def request_name(scope: Scope) -> str | None:
    """Return the ``X-Request-Id`` of a request, set by ``RequestNames``."""
    name: str | None = scope.get("state", {}).get("request_name")
    return name


class APIError(Exception):
    """An answer with a status other than 200."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        for_anthropic: str | None = None,
    ) -> None:
        """``for_anthropic``: message in Anthropic's dialect, if its clients parse it."""
        super().__init__(_short(message, MAX_MESSAGE))
        self._for_anthropic = for_anthropic or str(self)
        self.status = status
        self.param = None if param is None else _short(param, MAX_QUOTED)
        self.code = code
        self.headers = headers

    def body(self, path: str = "", request_name: str | None = None) -> dict[str, Any]:
        """Return the body of the answer in the form of the API of ``path``."""
        if path.startswith(ANTHROPIC):
            kind = ANTHROPIC_KINDS.get(self.status, "invalid_request_error")
            error = {"type": kind, "message": self._for_anthropic}
            return {"type": "error", "error": error, "request_id": request_name}
        kind = KINDS.get(self.status, "invalid_request_error")
        return {
            "error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        }

    def response(self, scope: Scope) -> Response:
        """Return the response to the request of ``scope``, and add the message to its log line."""
        note_error(str(self))
        body = self.body(scope["path"], request_name(scope))
        return PlainJSON(body, self.status, headers=self.headers)


class PlainJSON(JSONResponse):
    """JSON that every client can parse."""

    def render(self, content: Any) -> bytes:
        return write_json(content, compact=True).encode()


def install(app: FastAPI) -> None:
    """Convert every failure of ``app`` to an ``APIError``."""

    @app.exception_handler(APIError)
    @app.exception_handler(RequestError)
    async def _failure(request: Request, error: APIError | RequestError) -> Response:
        return of_failure(error).response(request.scope)

    @app.exception_handler(RequestValidationError)
    async def _path(request: Request, error: RequestValidationError) -> Response:
        field = str(error.errors()[0]["loc"][-1])
        refusal = APIError(400, f"{quoted(field)} in the address has the wrong type.", param=field)
        return refusal.response(request.scope)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        message = {
            404: f"The path {request.url.path} does not exist: {_nearest_path(app, request)}",
            405: f"{request.url.path} does not support {request.method}: see /openapi.json.",
        }.get(error.status_code, str(error.detail))
        headers = dict(error.headers or {})
        if error.status_code == 405:  # the route that refused lists only its own methods
            headers["Allow"] = ", ".join(_methods(app, request))
        return APIError(error.status_code, message, headers=headers).response(request.scope)

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> Response:
        return APIError(500, SERVER_FAILED).response(request.scope)


def _nearest_path(app: FastAPI, request: Request) -> str:
    """Return a question with the path that resembles that of ``request``, or else the place of the
    list of paths."""
    known = [path for route in app.routes if "{" not in (path := getattr(route, "path", "{"))]
    asked = request.url.path[:MAX_MESSAGE]
    near = [path for path in (f"/v1{asked}", asked.removesuffix("/")) if path in known]
    near = near or get_close_matches(asked, known, n=1, cutoff=0.8)
    return f"did you mean {near[0]}?" if near else "see /openapi.json for all paths."


def _methods(app: FastAPI, request: Request) -> list[str]:
    """Return the methods of the path of ``request``."""
    found: set[str] = set()
    for route in app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            found |= getattr(route, "methods", None) or set()
    return sorted(found)


def of_validation(error: ValidationError, body: Any, known: Collection[str] = ()) -> APIError:
    """Describe the error in ``body`` in one sentence. ``known`` are the names of its top level.

    The most deeply nested error is chosen; the errors above it only mean that one of several forms
    does not match.
    """
    errors = error.errors(include_url=False)
    first = max(errors, key=lambda one: len(one["loc"]))
    param = _param(first, body)
    where = "A name in the body" if param is None else quoted(param)
    match first["type"]:
        case "missing":
            return APIError(400, f"{where} is missing: add it.", param=param)
        case "extra_forbidden":
            near = get_close_matches(str(param), known, n=1, cutoff=0.75)
            remedy = f"did you mean '{near[0]}'?" if near else "check its spelling or drop it."
            message = f"{where} is not a parameter of this endpoint: {remedy}"
            return APIError(400, message, param=param, code="unknown_parameter")
        case "value_error":
            return APIError(400, str(first["ctx"]["error"]), param=param)
    # Every allowed form of a value gives an error. If the value has one of the forms, the errors of
    # the other forms are irrelevant.
    here = [one for one in errors if _param(one, body) == param]
    of_form = [one for one in here if not one["type"].endswith("_type")]
    forms = dict.fromkeys(_expected(one) for one in of_form or here)
    expected = " or ".join(forms).replace(" or be ", " or ")
    shown = _shown(first.get("input"))
    return APIError(400, f"{where} must {expected} (got {shown}).", param=param)


def _param(error: Mapping[str, Any], body: Any) -> str | None:
    """Return the path of names to the value of ``error`` in ``body``, without pydantic's internal
    names. None if the error is in a name."""
    names, value = [], body
    for part, following in zip_longest(error["loc"], error["loc"][1:]):
        places: Any = value if isinstance(value, dict) else ()
        if isinstance(value, list):
            places = range(len(value))
        is_tag = isinstance(value, dict) and value.get("type") == part and following in value
        if part in places and not is_tag:
            value = value[part]
        elif error["type"] != "missing" or following is not None:
            continue
        names.append(str(part))
    return ".".join(names) or None


def _expected(error: Mapping[str, Any]) -> str:
    """Return the requirement that a value violates, to follow "must"."""
    limits = error.get("ctx", {})
    match error["type"]:
        case "greater_than_equal":
            return f"be at least {_number(limits['ge'])}"
        case "greater_than":
            return f"be above {_number(limits['gt'])}"
        case "less_than_equal":
            return f"be at most {_number(limits['le'])}"
        case "less_than":
            return f"be below {_number(limits['lt'])}"
        case "literal_error":
            return f"be {limits['expected']}"
        case "union_tag_invalid":
            return f"be of the type {str(limits['expected_tags']).replace(', ', ' or ')}"
        case "string_too_long":
            return f"have at most {counted(limits['max_length'], 'character')}"
        case "too_short":
            return f"have {_entries('at least', limits['min_length'])}"
        case "too_long":
            return f"have {_entries('at most', limits['max_length'])}"
    return f"be {EXPECTED.get(error['type'], 'of another form')}"


def _entries(limit: str, number: int) -> str:
    return f"{limit} {number:,} {'entry' if number == 1 else 'entries'}"


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def quoted(text: str) -> str:
    """Return text of a client in quotation marks, cut to a bounded length."""
    return f"'{_short(text, MAX_QUOTED)}'"


def _shown(value: Any) -> str:
    """Return ``value`` as JSON, without the contents of lists and objects. O(1)."""
    if isinstance(value, list | dict):
        return ("[...]" if value else "[]") if isinstance(value, list) else "{...}"
    shown = json.dumps(value[:MAX_QUOTED] if isinstance(value, str) else value, default=str)
    return _short(shown, MAX_QUOTED)


def _short(text: str, most: int) -> str:
    """Return ``text`` on one line, cut at ``most`` characters."""
    cut = text if len(text) <= most else text[: most - 3] + "..."
    return whole_text(" ".join(cut.splitlines()))


def of_failure(error: Exception, param: str | None = None) -> APIError:
    """Convert ``error`` to the error that clients get, no matter which process raised it.

    ``param`` names the part of the body that caused it.
    """
    if isinstance(error, APIError):
        return error
    if not isinstance(error, RequestError):
        logger.error("A request failed.", exc_info=error)
        return APIError(500, SERVER_FAILED)
    if error.kind not in REFUSALS:
        return APIError(500, f"The engine failed on this request: {str(error).rstrip('.')}.")
    status, code = REFUSALS[error.kind]
    retry_after_s = RETRY_AFTER_S.get(error.kind)
    return APIError(
        status,
        str(error),
        param=param,
        code=code,
        headers=None if retry_after_s is None else {"Retry-After": str(retry_after_s)},
        for_anthropic=_too_long(error) if isinstance(error, ContextOverflow) else None,
    )


def _too_long(error: ContextOverflow) -> str:
    """Return the sentence that Anthropic's clients recognise."""
    room = error.max_model_len - min(error.max_tokens, 1)
    return f"prompt is too long: {error.prompt_len} tokens > {room} maximum"
