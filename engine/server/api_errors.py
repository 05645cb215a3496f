"""Error responses in the form of each dialect, with one sentence on how to correct the request."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from engine.errors import (
    ContextOverflow,
    DuplicateId,
    EngineStopped,
    InvalidRequest,
    QueueFull,
    RequestError,
)
from engine.text.bounded import whole_text

logger = logging.getLogger(__name__)
NAMED = re.compile(r"'(\w[\w.]*)'|^([a-z]\w*) ")
"""Name of a parameter in a message; those of the engine begin with it."""
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
    503: "overloaded_error",
    **dict.fromkeys((500, 502), "api_error"),
}
REFUSALS: dict[str, tuple[int, str | None, dict[str, str] | None]] = {
    ContextOverflow.kind: (400, "context_length_exceeded", None),
    DuplicateId.kind: (409, "duplicate_request_id", None),
    QueueFull.kind: (429, "queue_full", {"Retry-After": "1"}),
    EngineStopped.kind: (503, "stopped", {"Retry-After": "10"}),
}
"""Status, code and headers of each kind of ``RequestError`` other than ``InvalidRequest``; any
further kind is a failure of the engine."""
KINDS = {404: "not_found_error", 429: "rate_limit_error"} | dict.fromkeys(
    (500, 502, 503), "server_error"
)


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
        """``param``: part of the body that caused it. With status 400 it is by default the one that
        the message names in quotation marks or begins with. ``for_anthropic``: message in
        Anthropic's dialect, if its clients parse it."""
        super().__init__(short(message, MAX_MESSAGE))
        if param is None and status == 400 and (named := NAMED.search(message)):
            param = named[1] or named[2]
        self._for_anthropic = for_anthropic or str(self)
        self.status, self.code, self.headers = status, code, headers
        self.param = None if param is None else short(param)

    def body(self, scope: Scope | None = None) -> dict[str, Any]:
        """Return the body of the answer to the request of ``scope``, or in OpenAI's form."""
        if scope is not None and scope["path"].startswith(ANTHROPIC):
            kind = ANTHROPIC_KINDS.get(self.status, "invalid_request_error")
            error: dict[str, Any] = {"type": kind, "message": self._for_anthropic}
            if self.code is not None:
                error["details"] = {"error_code": self.code}
            request_id = scope.get("state", {}).get("request_id")
            return {"type": "error", "error": error, "request_id": request_id}
        kind = KINDS.get(self.status, "invalid_request_error")
        return {
            "error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        }

    def response(self, scope: Scope) -> Response:
        """Return the response to the request of ``scope``, and add the message to its log line."""
        note_error(scope, self)
        content = msgspec.json.encode(self.body(scope))
        return Response(content, self.status, self.headers, "application/json")


def note_error(scope: Scope, error: APIError) -> None:
    """Record the error that the client gets, for the request's line in the log."""
    scope.setdefault("state", {})["error"] = str(error)


async def _refuse(request: Request, error: Exception) -> Response:
    return of_failure(error).response(request.scope)


async def _refuse_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, routes = request.url.path, request.app.routes
    message, headers = str(error.detail), dict(error.headers or {})
    if error.status_code == 404:
        known, asked = [route.path for route in routes if "{" not in route.path], path[:MAX_MESSAGE]
        near = get_close_matches(asked, known, n=1, cutoff=0.8)
        remedy = f"did you mean {near[0]}?" if near else "see /openapi.json for all paths."
        message = f"The path {path} does not exist: {remedy}"
    elif error.status_code == 405:
        message = f"{path} does not support {request.method}: see /openapi.json."
    return APIError(error.status_code, message, headers=headers).response(request.scope)


HANDLERS = {
    APIError: _refuse,
    RequestError: _refuse,
    HTTPException: _refuse_path,
    Exception: _refuse,
}
"""Functions that convert each failure of an application to the answer of an ``APIError``."""


def quoted(text: str) -> str:
    """Return text of a client in quotation marks, cut to a bounded length."""
    return f"'{short(text)}'"


def short(text: str, most: int = MAX_QUOTED) -> str:
    """Return ``text`` on one line, cut at ``most`` characters."""
    cut = text if len(text) <= most else text[: most - 3] + "..."
    return whole_text(" ".join(cut.splitlines()))


def of_failure(error: Exception) -> APIError:
    """Convert ``error`` to the error that clients get, no matter which process raised it."""
    if isinstance(error, APIError):
        return error
    if not isinstance(error, RequestError):
        logger.error("A request failed.", exc_info=error)
        return APIError(500, "The server failed on this request; see its log for the reason.")
    if error.kind == InvalidRequest.kind:
        return APIError(400, str(error))
    if error.kind not in REFUSALS:
        return APIError(500, f"The engine failed on this request: {str(error).rstrip('.')}.")
    (status, code, headers), for_anthropic = REFUSALS[error.kind], None
    if isinstance(error, ContextOverflow):  # The sentence that Anthropic's clients recognise.
        room = error.max_model_len - min(error.max_tokens, 1)
        for_anthropic = f"prompt is too long: {error.prompt_len} tokens > {room} maximum"
    return APIError(status, str(error), code=code, headers=headers, for_anthropic=for_anthropic)
