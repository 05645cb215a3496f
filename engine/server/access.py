"""Access of clients: their connections, API keys, the operator, CORS, request ids and the log of
requests, and the tenants that own requests."""

from __future__ import annotations

import asyncio
import codecs
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import re
import secrets
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from engine.server.api_errors import ANTHROPIC, APIError
from engine.server.settings import API_KEY_VARIABLE, ServerConfig
from engine.text.json_text import REPLACEMENT
from hybridcache.command.signals import log_to_stderr

logger = logging.getLogger(__name__)
request_log = logging.getLogger(f"{__name__}.requests")
OPEN = ("/", "/health", "/metrics")
"""Paths that require no key."""
FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
"""Headers that proxies add. Clients of a proxy are not on this machine."""
OPERATORS = ("/v1/cache", "/reset_prefix_cache", "/flush_cache")
"""Beginnings of the paths that only the operator may use."""
KEY = re.compile(rb"[\x21-\x7e]+")
NAME = re.compile(rb"[\x21-\x7e]{1,128}")
"""Pattern of the ids that clients may send in ``X-Request-Id``."""


# --- Keys -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """Keys of one server."""

    accepted: Sequence[bytes]
    """Distinct keys of which a request needs one, the operator's included; empty if no key is
    required."""
    operator: bytes | None
    """Key of the operator, or None if its requests are distinguished by their address."""
    are_salts: bool
    """True if requests with different keys share no cache entries. By default they do not if
    clients have several keys, because the number of reused tokens reveals shared prompts."""

    @classmethod
    def of(cls, config: ServerConfig) -> ServerKeys:
        """Read the keys. Raises ValueError if a file cannot be read or is empty, or a key cannot be
        sent in a header."""
        accepted, operator = list[bytes](), None
        if (named := os.environ.get(API_KEY_VARIABLE)) is not None:
            accepted += _sendable([named.encode()], API_KEY_VARIABLE)
        if config.api_key_file is not None:
            accepted += _read_keys("--api-key-file", config.api_key_file)
        if config.salt_by_key and not accepted:
            message = f"--salt-by-key needs keys: give --api-key-file or {API_KEY_VARIABLE}."
            raise ValueError(message)
        are_salts = config.salt_by_key
        if are_salts is None:
            are_salts = len(set(accepted)) > 1
        if (file := config.admin_key_file) is not None:
            operator, *more = _read_keys("--admin-key-file", file)
            if more:
                message = f"--admin-key-file {file} has {1 + len(more)} keys"
                raise ValueError(f"{message}; it must contain a single key.")
            accepted += [operator] if accepted else []
        return cls(list(dict.fromkeys(accepted)), operator, are_salts)

    def place(self, scope: Scope) -> int | None:
        """Return the index of the request's key, or None if it is invalid, in time independent of
        the keys."""
        given = _given_key(scope)
        # All keys are compared, even after a match.
        fits = [hmac.compare_digest(given, key) for key in self.accepted]
        return fits.index(True) if any(fits) else None

    def refusal(self, scope: Scope) -> APIError:
        """Return the answer to a request without a valid key for its path."""
        is_reserved = self.operator is not None and scope["path"].startswith(OPERATORS)
        source = "--admin-key-file" if is_reserved else f"--api-key-file or {API_KEY_VARIABLE}"
        wrong = ": the key of this request is another" if _given_key(scope) else ""
        message = f"Send a key of {source} as Authorization: Bearer KEY{wrong}."
        challenge = {"WWW-Authenticate": "Bearer"}
        return APIError(401, message, code="invalid_api_key", headers=challenge)

    def check_operator(self, request: Request) -> None:
        """Raise APIError 401 or 403 unless the operator sent the request. The operator has access
        to the cache of all clients.

        Without a key, the client must be on this machine, by its address and by the host that it
        names. A foreign page in a local browser has a different ``Origin``, or a different ``Host``
        if its name was rebound to this address.
        """
        if self.operator is not None:
            if not hmac.compare_digest(_given_key(request.scope), self.operator):
                raise self.refusal(request.scope)
            return
        headers = request.headers
        origin = headers.get("origin")
        is_here = (
            request.client is not None
            and ipaddress.ip_address(request.client.host).is_loopback
            and _is_local("//" + headers.get("host", ""))
            and (origin is None or _is_local(origin))
            and not any(name in headers for name in FORWARDED)
        )
        if not is_here:
            raise APIError(
                403,
                "This path is reserved for the operator: send the request from the server's "
                "machine to localhost, or start the server with --admin-key-file.",
            )


def _given_key(scope: Scope) -> bytes:
    """Return the key that a request brings. Empty if it brings none."""
    headers = dict(scope["headers"])
    scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() != b"bearer":
        given = headers.get(b"x-api-key", b"")  # the header of Anthropic's clients
    return bytes(given.strip())


def _is_local(url: str) -> bool:
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name, or brackets without an address
        return False


def _read_keys(flag: str, file: str) -> list[bytes]:
    """Read the keys in the ``file`` of this ``flag``, one per line. A comment begins with ``#`` at
    the start of the line or after a space."""
    try:
        text = Path(file).read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise ValueError(f"{flag} {file!r} cannot be read ({error.strerror}).") from error
    lines = [re.split(rb"(?:^|\s)#", line, maxsplit=1)[0] for line in text.splitlines()]
    return _sendable(lines, f"{flag} {file}")


def _sendable(lines: list[bytes], source: str) -> list[bytes]:
    """Return the keys in ``lines``. Raises ValueError if there is none, or if one cannot be sent in
    a header."""
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise ValueError(f"{source} has no key: write one into it.")
    for number, key in enumerate(keys, 1):
        if not KEY.fullmatch(key):
            raise ValueError(
                f"{source}: key {number} of {len(keys)} must be printable ASCII without spaces; "
                "`openssl rand -hex 24` prints such a key."
            )
    return keys


# --- Connections ----------------------------------------------------------------------------------

HEADERS_S = 10.0
"""Time in which the headers of a request must arrive, from the start of the connection or the end
of the previous answer on."""


class ClientConnection(H11Protocol):
    """Connection of a client, closed if the headers of a request do not arrive in time."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_headers()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait_for_headers()

    def _wait_for_headers(self) -> None:
        self.loop.call_later(HEADERS_S, self._close_if_late, self.cycle)

    def _close_if_late(self, previous: RequestResponseCycle | None) -> None:
        # The next request may have arrived before the end of the previous answer.
        is_answering = previous is not None and not previous.response_complete
        if self.cycle is previous and not is_answering and not self.transport.is_closing():
            self.transport.close()


# --- Middleware and the log -----------------------------------------------------------------------


def install(app: Starlette, config: ServerConfig, keys: ServerKeys) -> None:
    """Add the middleware to ``app``, the last one outermost."""
    is_logged = sys.stderr.isatty() if config.log_requests is None else config.log_requests
    app.add_middleware(Requests, keys=keys, is_logged=is_logged)
    if config.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origin),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
        )


PROBES = ("/health", "/metrics")
"""Paths that monitors poll; their lines have the level DEBUG."""
MAX_PATH = 200
"""Maximum length of a path in a line."""


def _log_request(scope: Scope, status: int, is_sent: bool, began_s: float) -> None:
    """Write the line of a request. ``status`` is 0 if the client left before the answer began;
    ``is_sent``: it got the whole answer."""
    path = quote(scope["path"], safe="/:@!$&'()*+,;=~-._")  # No control characters.
    state, sent = scope["state"], "" if is_sent else "not sent completely"
    notes = filter(None, (state.get("answer_id"), sent, state.get("error")))
    said = "".join(f"  {note}" for note in notes)
    counts = state.get("num_tokens")
    request_log.log(
        logging.DEBUG if scope["path"] in PROBES else logging.INFO,
        "%s %s %d%s  %.0f ms%s",
        scope["method"],
        path if len(path) <= MAX_PATH else path[:MAX_PATH] + "...",
        status or 499,
        "  prompt {:,}  cached {:,}  answer {:,}".format(*counts) if counts else "",
        1000 * (time.perf_counter() - began_s),
        "".join(letter if letter.isprintable() else "?" for letter in said),
    )


def set_up_logging(level: str) -> None:
    """Send the log of engine and HTTP server from ``level`` on to the standard error output.
    Request lines, if enabled, do not depend on ``level``."""
    log_to_stderr(level, "engine", "uvicorn")
    request_log.setLevel(min(logging.getLogger("engine").level, logging.INFO))


UNREAD_S = 120.0
"""Seconds that a client may read nothing of a waiting answer before the answer is broken off. Until
then the rest of it is computed and kept in memory."""


class Requests:
    """ASGI middleware that answers 401 to requests without a valid key, and records the key of the
    others. Every answer gets an ``X-Request-Id``: the one of the request, or a new one. Anthropic's
    clients read it as ``request-id``. An answer that its client does not read is broken off. The
    log gets a line when an answer was sent or its client has disconnected. Facts for the line are
    in the state of the ASGI scope: ``answer_id``, ``error``, and ``num_tokens`` of prompt, cache
    and answer."""

    def __init__(self, app: ASGIApp, keys: ServerKeys, is_logged: bool) -> None:
        self._app, self._keys, self._is_logged = app, keys, is_logged

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        name = given if NAME.fullmatch(given) else uuid.uuid4().hex.encode()
        app, state = self._app, scope.setdefault("state", {})
        state["request_id"] = name.decode("ascii")
        if self._keys.accepted and scope["path"] not in OPEN:
            state["api_key"] = self._keys.place(scope)
            if state["api_key"] is None:
                app = self._keys.refusal(scope).response(scope)
        headers = [(b"x-request-id", name)]
        if scope["path"].startswith(ANTHROPIC):
            headers.append((b"request-id", name))
        began_s, status, is_sent = time.perf_counter(), 0, False

        async def watched(message: Message) -> None:
            nonlocal status, is_sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *headers]
            async with asyncio.timeout(UNREAD_S):
                await send(message)
            is_sent = message["type"] == "http.response.body" and not message.get("more_body")

        try:
            await app(scope, receive, watched)
        except Exception:
            status = status or 500
            raise
        finally:
            if self._is_logged:
                _log_request(scope, status, is_sent, began_s)


# --- Tenants --------------------------------------------------------------------------------------

SALT_HEADER = "x-cache-salt"
"""Header for the salt of a request, as an alternative to ``cache_salt`` in the body, on every
method."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """Owner of requests and of the answers to them."""

    key: int | None = None
    """Index of the API key among those of the server, or None if the server requires none."""
    namespace: str | None = None
    """Keyed hash of the salt, or None if the request has no salt. The cache uses only this part."""


SECRET_FILE, SECRET_BYTES = "salt-secret", 32
"""Name and size of the file in a kept folder with the key of the hashes of salts."""


def _read_secret(folder: str | None) -> bytes:
    """Return the key with which salts are hashed: a new one, or the one of ``folder``, in which the
    cache is kept for the next start. It is there in a file for its owner only."""
    made = secrets.token_bytes(SECRET_BYTES)
    if folder is None:
        return made
    file, why, kept = Path(folder) / SECRET_FILE, "", made
    try:
        private = partial(os.open, mode=0o600)
        with suppress(FileExistsError), open(file, "xb", opener=private) as new:
            new.write(made)
            why = "was missing" if any(Path(folder).glob("*.record")) else ""
        kept = file.read_bytes()
        if len(kept) != SECRET_BYTES:
            why = f"cannot be used (it has {len(kept)} bytes and not {SECRET_BYTES}; delete it)"
    except OSError as error:
        why = f"cannot be used ({error.strerror})"
    if why:
        words = "%s %s: entries of requests with a salt, or with one of several keys, get lost."
        logger.warning(words, file, why)
    return kept if len(kept) == SECRET_BYTES else made


class Tenants:
    """Distinguishes tenants. Salts are secret and namespaces are visible, so they are hashed with a
    secret key, which prevents guessing of salts."""

    def __init__(self, keys: ServerKeys, kept_folder: str | None) -> None:
        """``kept_folder``: folder in which the cache is kept for the next start."""
        self._secret = _read_secret(kept_folder)
        self._keys = keys.accepted if keys.are_salts else ()

    def of(self, scope: Scope, salt: str | None = None) -> Tenant:
        """Return the tenant of a request with ``salt`` in its body. Raises APIError 400 if its
        salts differ, or one is empty or not text."""
        name = SALT_HEADER.encode()
        values = (value for header, value in scope["headers"] if header == name)
        given = {value.decode(errors="replace") for value in values}
        given |= set() if salt is None else {salt}
        # Invalid characters are decoded as U+FFFD, which would make different salts equal.
        if len(given) > 1 or any(not one or REPLACEMENT in one for one in given):
            message = f"A request has one salt, as 'cache_salt' or {SALT_HEADER}: a text that is "
            message += "not empty and does not contain U+FFFD, the sign of invalid characters."
            raise APIError(400, message)
        place: int | None = scope.get("state", {}).get("api_key")
        # The key itself: its index is that of another key once the file of keys has changed.
        by_key = [self._keys[place].hex()] if self._keys and place is not None else []
        if not by_key and not given:
            return Tenant(place)
        parts = json.dumps([by_key, *given]).encode()
        return Tenant(place, hmac.new(self._secret, parts, hashlib.sha256).hexdigest()[:32])
