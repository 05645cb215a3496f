"""Access control: API keys, CORS, and the request id of every answer."""

from __future__ import annotations

import codecs
import hmac
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.server.config import API_KEY_VARIABLE, ServerConfig, flag
from engine.server.errors import ANTHROPIC, APIError

OPEN = ("/", "/health", "/metrics")
"""Paths that require no key."""
NAME = re.compile(rb"[\x21-\x7e]{1,128}")
"""Pattern of the ids that clients may send in ``X-Request-Id``."""


def install(app: FastAPI, config: ServerConfig) -> None:
    """Add the middleware to ``app``, the last one outermost. Raises ValueError if a key file is
    missing or empty."""
    keys = api_keys(config, os.environ)
    if keys:
        app.add_middleware(Keys, keys=list(dict.fromkeys(keys)))
    if config.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origin),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    app.add_middleware(RequestNames)


def api_keys(config: ServerConfig, environment: Mapping[str, str]) -> list[bytes]:
    """Return the accepted keys, including the operator's. Empty if no key is required."""
    named = environment.get(API_KEY_VARIABLE, "").strip().encode()
    keys = [named] if named else []
    if config.api_key_file is not None:
        keys += read_keys("api_key_file", config.api_key_file)
    if keys and config.admin_key_file is not None:
        keys.append(read_key("admin_key_file", config.admin_key_file))
    return keys


def read_keys(setting: str, file: str) -> list[bytes]:
    """Read the keys in the ``file`` of this ``setting``, one per line. Raises ValueError if it
    cannot be read or is empty."""
    try:
        text = Path(file).read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise ValueError(f"{flag(setting)} {file} cannot be read ({error.strerror}).") from error
    keys = [line.strip() for line in text.splitlines() if line.strip()]
    if not keys:
        raise ValueError(f"{flag(setting)} {file} is empty. Write a key into it.")
    return keys


def read_key(setting: str, file: str) -> bytes:
    """Read the only key in the ``file`` of this ``setting``. Raises ValueError if it cannot be
    read, or has no key or several."""
    keys = read_keys(setting, file)
    if len(keys) > 1:
        raise ValueError(
            f"{flag(setting)} {file} has {len(keys)} lines; it must contain a single key."
        )
    return keys[0]


class Keys:
    """ASGI middleware that answers 401 to requests without a valid key, and records the key of the
    others."""

    def __init__(self, app: ASGIApp, keys: Sequence[bytes]) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self._app(scope, receive, send)
            return
        place = self._place(scope)
        if place is not None:
            scope.setdefault("state", {})["api_key"] = place
            await self._app(scope, receive, send)
            return
        message = "This server requires a key: send it as Authorization: Bearer KEY."
        if given_key(scope):
            message = "This key is unknown: send one of the keys of --api-key-file."
        refusal = APIError(
            401,
            message,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await refusal.response(scope)(scope, receive, send)

    def _place(self, scope: Scope) -> int | None:
        """Return the index of the request's key, or None if it is invalid, in time independent of
        the keys."""
        given = given_key(scope)
        # All keys are compared, even after a match.
        fits = [hmac.compare_digest(given, key) for key in self._keys]
        return fits.index(True) if any(fits) else None


def given_key(scope: Scope) -> bytes:
    """Return the key that a request brings. Empty if it brings none."""
    headers = dict(scope["headers"])
    scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() != b"bearer":
        given = headers.get(b"x-api-key", b"")  # the header of Anthropic's clients
    return bytes(given.strip())


class RequestNames:
    """ASGI middleware that adds an ``X-Request-Id`` to every answer: the one of the request, or a
    new one. Anthropic's clients read it as ``request-id``."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        name = given if NAME.fullmatch(given) else uuid.uuid4().hex.encode()

        scope.setdefault("state", {})["request_name"] = name.decode("ascii")
        headers = [(b"x-request-id", name)]
        if scope["path"].startswith(ANTHROPIC):
            headers.append((b"request-id", name))

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *headers]
            await send(message)

        await self._app(scope, receive, named)
