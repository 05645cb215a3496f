"""Access control: API keys, the operator, CORS, request ids, and the tenants that own requests."""

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
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.server.api_errors import ANTHROPIC, APIError
from engine.server.settings import API_KEY_VARIABLE, ServerConfig, flag
from engine.text.json_text import REPLACEMENT

logger = logging.getLogger(__name__)
OPEN = ("/", "/health", "/metrics")
"""Paths that require no key."""
OPERATORS = ("/v1/cache", "/reset_prefix_cache", "/flush_cache")
"""Beginnings of the paths that only the operator may use."""
KEY = re.compile(rb"[\x21-\x7e]+")
NAME = re.compile(rb"[\x21-\x7e]{1,128}")
"""Pattern of the ids that clients may send in ``X-Request-Id``."""


def install(app: Starlette, config: ServerConfig) -> None:
    """Add the middleware to ``app``, the last one outermost. Raises ValueError if a key file is
    missing or empty."""
    if keys := api_keys(config):
        has_operator = config.admin_key_file is not None
        app.add_middleware(Keys, keys=keys, has_operator=has_operator)
    if config.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origin),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    app.add_middleware(RequestNames)


def api_keys(config: ServerConfig) -> list[bytes]:
    """Return the distinct accepted keys, including the operator's. Empty if no key is required."""
    keys = _client_keys(config)
    if keys and config.admin_key_file is not None:
        keys.append(read_key("admin_key_file", config.admin_key_file))
    if config.salt_by_key and not keys:
        raise ValueError(f"--salt-by-key needs keys: give --api-key-file or {API_KEY_VARIABLE}.")
    return list(dict.fromkeys(keys))


def _client_keys(config: ServerConfig) -> list[bytes]:
    named = os.environ.get(API_KEY_VARIABLE)
    keys = [] if named is None else [named.strip().encode()]
    _require_sendable(keys, API_KEY_VARIABLE)
    if config.api_key_file is not None:
        keys += read_keys("api_key_file", config.api_key_file)
    return keys


def separates_keys(config: ServerConfig) -> bool:
    """Return whether requests with different keys share no cache entries: by default if clients
    have several keys, because the number of reused tokens reveals shared prompts."""
    if config.salt_by_key is not None:
        return config.salt_by_key
    return len(set(_client_keys(config))) > 1


def read_keys(setting: str, file: str) -> list[bytes]:
    """Read the keys in the ``file`` of this ``setting``, one per line. Raises ValueError if it
    cannot be read or is empty, or a key cannot be sent in a header."""
    try:
        text = Path(file).read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise ValueError(f"{flag(setting)} {file!r} cannot be read ({error.strerror}).") from error
    keys = [line.strip() for line in text.splitlines() if line.strip()]
    if not keys:
        raise ValueError(f"{flag(setting)} {file} is empty. Write a key into it.")
    _require_sendable(keys, f"{flag(setting)} {file}")
    return keys


def _require_sendable(keys: Sequence[bytes], source: str) -> None:
    """Raise ValueError if a key is blank or cannot be sent in a header."""
    for number, key in enumerate(keys, 1):
        if not KEY.fullmatch(key):
            raise ValueError(
                f"{source}: key {number} of {len(keys)} must be printable ASCII without spaces; "
                "`openssl rand -hex 24` prints such a key."
            )


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

    def __init__(self, app: ASGIApp, keys: Sequence[bytes], has_operator: bool) -> None:
        """``has_operator``: the operator has a key, which is one of ``keys``."""
        self._app = app
        self._keys = keys
        self._has_operator = has_operator

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
            message = f"This key is unknown: send one of --api-key-file or {API_KEY_VARIABLE}."
        if self._has_operator and scope["path"].startswith(OPERATORS):
            message = operator_message(bool(given_key(scope)))
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


def operator_message(has_key: bool) -> str:
    """Return the message to a request for an operator's path without the operator's key, with or
    without another key."""
    if has_key:
        return (
            "This path is reserved for the operator, and this key is wrong: send the key of "
            "--admin-key-file."
        )
    return (
        "This path is reserved for the operator: send the key of --admin-key-file as "
        "Authorization: Bearer KEY."
    )


def given_key(scope: Scope) -> bytes:
    """Return the key that a request brings. Empty if it brings none."""
    headers = dict(scope["headers"])
    scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() != b"bearer":
        given = headers.get(b"x-api-key", b"")  # the header of Anthropic's clients
    return bytes(given.strip())


UNREAD_S = 120.0
"""Seconds that a client may read nothing of a waiting answer before the answer is broken off. Until
then the rest of it is computed and kept in memory."""


class RequestNames:
    """ASGI middleware that adds an ``X-Request-Id`` to every answer: the one of the request, or a
    new one. Anthropic's clients read it as ``request-id``. An answer that its client does not read
    is broken off."""

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
            async with asyncio.timeout(UNREAD_S):
                await send(message)

        await self._app(scope, receive, named)


FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
"""Headers that proxies add. Clients of a proxy are not on this machine."""


@dataclass(frozen=True, slots=True)
class Operator:
    """Distinguishes the operator's requests, by key or, without one, by this machine's address. The
    operator has access to the cache of all clients."""

    key: bytes | None

    @classmethod
    def of(cls, config: ServerConfig) -> Operator:
        """Read the key. Raises ValueError if its file is missing or empty."""
        if config.admin_key_file is None:
            return cls(None)
        return cls(read_key("admin_key_file", config.admin_key_file))

    def check(self, request: Request) -> None:
        """Raise APIError 401 or 403 unless the operator sent the request.

        Without a key, the client must be on this machine, by its address and by the host that it
        names. A foreign page in a local browser has a different ``Origin``, or a different ``Host``
        if its name was rebound to this address.
        """
        if self.key is not None:
            given = given_key(request.scope)
            if not hmac.compare_digest(given, self.key):
                challenge = {"WWW-Authenticate": "Bearer"}
                raise APIError(
                    401, operator_message(bool(given)), code="invalid_api_key", headers=challenge
                )
            return
        headers = request.headers
        origin = headers.get("origin")
        is_here = (
            request.client is not None
            and _is_here(request.client.host)
            and _is_here(_host_of("//" + headers.get("host", "")))
            and (origin is None or _is_here(_host_of(origin)))
            and not any(name in headers for name in FORWARDED)
        )
        if not is_here:
            raise APIError(
                403,
                "This path is reserved for the operator: send the request from the server's "
                "machine to localhost, or start the server with --admin-key-file.",
            )


def _host_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:  # brackets without an address
        return None


def _is_here(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return host is not None and ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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

    @property
    def is_known(self) -> bool:
        """True if a secret identifies this tenant. Without one, clients without any relation are
        the same tenant."""
        return self.key is not None or self.namespace is not None


SECRET_FILE, SECRET_BYTES = "salt-secret", 32
"""Name and size of the file in a kept folder with the key of the hashes of salts."""


def _for_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def read_secret(folder: str | None) -> bytes:
    """Return the key with which salts are hashed: a new one, or the one of ``folder``, in which the
    cache is kept for the next start. It is there in a file for its owner only."""
    made = secrets.token_bytes(SECRET_BYTES)
    if folder is None:
        return made
    file = Path(folder) / SECRET_FILE
    try:
        with suppress(FileExistsError), open(file, "xb", opener=_for_owner) as new:
            new.write(made)
        kept = file.read_bytes()
        if len(kept) == SECRET_BYTES:
            return kept
        why = f"it has {len(kept)} bytes and not {SECRET_BYTES}; delete it"
    except OSError as error:
        why = error.strerror or str(error)
    logger.warning(
        "Entries of requests with a salt, or with one of several keys, will not be found after a "
        "restart: %s cannot be used (%s).",
        file,
        why,
    )
    return made


class Tenants:
    """Distinguishes tenants. Salts are secret and namespaces are visible, so they are hashed with a
    secret key, which prevents guessing of salts."""

    def __init__(self, secret: bytes, keys: Sequence[bytes] = ()) -> None:
        """``keys``: the API keys, if they are a part of every salt."""
        self._secret = secret
        self._keys = keys

    @classmethod
    def of_server(cls, config: ServerConfig, kept_folder: str | None) -> Tenants:
        """Make the tenants of a server. ``kept_folder``: folder in which its cache is kept."""
        keys = api_keys(config) if separates_keys(config) else ()
        return cls(read_secret(kept_folder), keys)

    def of(self, scope: Scope, salt: str | None = None) -> Tenant:
        """Return the tenant of a request with ``salt`` in its body. Raises APIError 400 if its
        salts differ, or one is empty or not text."""
        name = SALT_HEADER.encode()
        given = {_header_salt(value) for header, value in scope["headers"] if header == name}
        if salt is not None:
            given.add(salt)
        if len(given) > 1:
            raise APIError(
                400,
                f"This request names different salts: send one, as 'cache_salt' or {SALT_HEADER}.",
                param="cache_salt",
            )
        if "" in given:
            raise APIError(
                400, "A salt must not be empty: omit it, or send text.", param="cache_salt"
            )
        if any(REPLACEMENT in one for one in given):
            # Invalid characters are decoded as this one, which would make different salts equal.
            raise APIError(
                400,
                "A salt must not contain U+FFFD, the replacement of invalid characters: "
                "choose another text.",
                param="cache_salt",
            )
        place: int | None = scope.get("state", {}).get("api_key")
        # The key itself: its index is that of another key once the file of keys has changed.
        by_key = [self._keys[place].hex()] if self._keys and place is not None else []
        if not by_key and not given:
            return Tenant(place)
        parts = json.dumps([by_key, *given]).encode()
        return Tenant(place, hmac.new(self._secret, parts, hashlib.sha256).hexdigest()[:32])


def _header_salt(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise APIError(
            400, f"The header {SALT_HEADER} must be UTF-8.", param="cache_salt"
        ) from None


def choice_id(answer_id: str, choice: int) -> str:
    """Return the engine's id for one of an answer's choices."""
    return f"{answer_id}-{choice}" if choice else answer_id


def new_id(kind: str, joint: str = "-") -> str:
    """Return a random id for an answer or a part of one."""
    return f"{kind}{joint}{uuid.uuid4().hex}"
