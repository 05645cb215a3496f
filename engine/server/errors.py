"""Whatever goes wrong, in OpenAI's shape and one sentence that says what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.async_engine import EngineStopped, RequestRefused, StepFailed

MAX_QUOTED, MAX_MESSAGE = 60, 280
"""Characters of what a client sent that an answer quotes, and of the whole message."""
ANTHROPIC = "/v1/messages"
"""Paths below it answer in Anthropic's shape."""
ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
FORMS = ("str", "constrained-str", "NamedTool", "NamedFunction")
"""What pydantic calls forms of a value, in between the names of a body."""
KINDS = {404: "not_found_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


def request_name(scope: Scope) -> str | None:
    """The ``X-Request-Id`` of a request, which ``RequestNames`` gave it."""
    name: str | None = scope.get("state", {}).get("request_name")
    return name


class APIError(Exception):
    """An answer other than 200."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(_short(message, MAX_MESSAGE))
        self.status = status
        self.param = None if param is None else _short(param, MAX_QUOTED)
        self.code = code
        self.headers = headers

    def body(self, path: str = "", request_name: str | None = None) -> dict[str, Any]:
        """The answer of ``path``, in the shape that its clients read."""
        if path.startswith(ANTHROPIC):
            kind = ANTHROPIC_KINDS.get(self.status, "invalid_request_error")
            error = {"type": kind, "message": str(self)}
            return {"type": "error", "error": error, "request_id": request_name}
        kind = KINDS.get(self.status, "invalid_request_error")
        return {
            "error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        }

    def response(self, scope: Scope) -> JSONResponse:
        """To the request of ``scope``."""
        body = self.body(scope["path"], request_name(scope))
        return JSONResponse(body, self.status, headers=self.headers)


def install(app: FastAPI) -> None:
    """Make every failure of ``app`` answer as an ``APIError``."""

    @app.exception_handler(APIError)
    async def _api_error(request: Request, error: APIError) -> JSONResponse:
        return error.response(request.scope)

    @app.exception_handler(EngineStopped)
    @app.exception_handler(StepFailed)
    async def _ended(request: Request, error: EngineStopped | StepFailed) -> JSONResponse:
        return of_failure(error).response(request.scope)

    @app.exception_handler(RequestValidationError)
    async def _path(request: Request, error: RequestValidationError) -> JSONResponse:
        field = str(error.errors()[0]["loc"][-1])
        refusal = APIError(400, f"{quoted(field)} in the address is not of its kind.", param=field)
        return refusal.response(request.scope)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        message = {
            404: f"There is no {request.url.path} here: see /docs for what there is.",
            405: f"{request.url.path} does not answer {request.method}: see /docs for what does.",
        }.get(error.status_code, str(error.detail))
        headers = dict(error.headers or {})
        if error.status_code == 405:  # the first route of this path, which refused, knows its own
            headers["Allow"] = ", ".join(_methods(app, request))
        return APIError(error.status_code, message, headers=headers).response(request.scope)

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> JSONResponse:
        failed = APIError(500, "The server failed on this request; its log says why.")
        return failed.response(request.scope)


def _methods(app: FastAPI, request: Request) -> list[str]:
    """What the path of ``request`` answers."""
    found: set[str] = set()
    for route in app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            found |= getattr(route, "methods", None) or set()
    return sorted(found)


def of_validation(error: ValidationError) -> APIError:
    """What is wrong with a body, in one sentence: the first of the errors that lie deepest, since
    those above them say only that one of several forms does not fit."""
    first = max(error.errors(include_url=False), key=lambda one: len(one["loc"]))
    parts = [str(part) for part in first["loc"] if str(part) not in FORMS]
    param = ".".join(part for part in parts if not part.startswith(("list[", "function-"))) or None
    where = "A name in the body" if param is None else quoted(param)
    match first["type"]:
        case "missing":
            return APIError(400, f"{where} is missing: add it.", param=param)
        case "extra_forbidden":
            message = f"{where} is not a parameter of this endpoint: check its spelling or drop it."
            return APIError(400, message, param=param, code="unknown_parameter")
        case "value_error":
            return APIError(400, str(first["ctx"]["error"]), param=param)
    shown = _shown(first.get("input"))
    return APIError(400, f"{where} can not be {shown}: {first['msg']}.", param=param)


def quoted(text: str) -> str:
    """``text``, which a client sent, as a message may quote it."""
    return f"'{_short(text, MAX_QUOTED)}'"


def _shown(value: Any) -> str:
    """``value`` as JSON, but not what is in it. O(1)."""
    if isinstance(value, list | dict):
        return ("[...]" if value else "[]") if isinstance(value, list) else "{...}"
    shown = json.dumps(value[:MAX_QUOTED] if isinstance(value, str) else value, default=str)
    return _short(shown, MAX_QUOTED)


def _short(text: str, most: int) -> str:
    """``text`` on one line, cut at ``most`` characters, without the lone surrogates (JSON's
    "\\ud800") that have no UTF-8."""
    cut = text if len(text) <= most else text[: most - 3] + "..."
    return " ".join(cut.splitlines()).encode("utf-8", "replace").decode()


def of_failure(error: Exception) -> APIError:
    """What an answer says that fails under way; a stream, after its 200 was sent."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, EngineStopped):
        return APIError(503, str(error), code="stopped", headers={"Retry-After": "10"})
    if isinstance(error, RequestRefused):
        return APIError(400, str(error))
    return APIError(500, f"The engine failed on this request: {error}.")


class BodyLimit:
    """ASGI middleware: answers 413 to bodies above ``max_bytes``, announced or not."""

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
                # An HTTPException: what else is raised while a body is read becomes FastAPI's own
                # 400.
                raise HTTPException(413, str(self._refusal()))
            return message

        await self._app(scope, counted, send)

    def _refusal(self) -> APIError:
        limit = self._max_bytes / 2**20
        return APIError(
            413, f"The body is larger than {limit:g} MiB: send less, or raise --max-body-mib."
        )
