"""Access of clients: API keys, tenants, the operator, connections, CORS and the log of requests."""

from __future__ import annotations

import codecs
import errno
import hashlib
import hmac
import ipaddress
import itertools
import json
import logging
import math
import os
import re
import secrets
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.front.server.bodies import ANTHROPIC, APIError, short
from engine.front.server.settings import API_KEY_VARIABLE, ServerConfig
from engine.text.bounded import REPLACEMENT, BoundedMemory
from hybridcache.geometry.units import counted

logger = logging.getLogger(__name__)
request_log = logging.getLogger(f"{__name__}.requests")
request_log.setLevel(logging.INFO)  # Regardless of log_level.
PROBES = ("/health", "/metrics")
"""Paths that monitors poll and that are not logged."""
OPEN = ("/", *PROBES)
"""Paths that require no key."""
FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
"""Headers that proxies add. Clients of a proxy are not on this machine."""
OPERATORS = ("/v1/cache", "/reset_prefix_cache", "/flush_cache")
"""Beginnings of the paths that only the operator may use."""
SECRET_FILE, SECRET_BYTES = "salt-secret", 32
"""Name and size of the file with the key of the hashes of salts."""
KEY = re.compile(rb"[\x21-\x7e]+")
KEY_NAME = re.compile(rb"[\w.@+-]{1,40}")
KEY_DIGITS = 8
"""Digits of the hash of a key that has no name: they stay when keys are added or removed."""
SHORT_KEY = 12
"""Characters below which a key is said to be short."""
MAX_GUESSES, GUESS_S = 20, 5.0
"""Wrong keys that one address may send at once, and seconds after which it may send another."""
NAME = re.compile(rb"[\x21-\x7e]{1,128}")
"""Pattern of the ids that clients may send in ``X-Request-Id``."""


# --- Keys and tenants -----------------------------------------------------------------------------

SALT_HEADER = "x-cache-salt"
"""Header for the salt of a request, on every method; as ``cache_salt`` in the body."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """Owner of requests and of the answers to them."""

    key: str | None = None
    """Name of the API key or else its hash, or None if the server requires none."""
    namespace: str | None = None
    """Keyed hash of the salt, after the name of the key if keys share nothing; or None if the
    request has no salt. The cache uses only this part."""


class Access:
    """API keys of one server, and the tenants that keys and salts distinguish."""

    def __init__(self, config: ServerConfig) -> None:
        """Read the keys. Raises ValueError for a file or a key that cannot be used."""
        self._config = config
        self.accepted: list[bytes] = []
        """Distinct keys that requests may have, the operator's too; empty if none is required."""
        self.reload()
        self._secret = secrets.token_bytes(SECRET_BYTES)
        self._proxies = [*map(_network, config.trusted_proxy)]
        self._guesses = BoundedMemory[str, tuple[float, frozenset[bytes]]](1 << 20)
        """Of each address, the time at which its wrong keys are forgotten, and its right keys."""

    def reload(self) -> None:
        """Read the keys again. Raises ValueError, with nothing changed, as at the start."""
        config, found, operator = self._config, dict[bytes, tuple[str, str]](), None
        if (named := os.environ.get(API_KEY_VARIABLE)) is not None:
            found |= _sendable({API_KEY_VARIABLE: named.encode()}, API_KEY_VARIABLE)
        if config.api_key_file is not None:
            found |= _read_keys("--api-key-file", config.api_key_file)
        accepted = list(found)
        if config.salt_by_key and not accepted:
            raise ValueError(f"--salt-by-key needs --api-key-file or {API_KEY_VARIABLE}.")
        num_keys = len({name or key for key, (name, _) in found.items()})
        if (file := config.admin_key_file) is not None:
            admin = _read_keys("--admin-key-file", file)
            operator, *more = admin
            if more:
                raise ValueError(f"--admin-key-file {file} must contain a single key.")
            if operator in found:
                said = f"{admin[operator][1]} has the key of {found[operator][1]}, which would make"
                raise ValueError(f"{said} that client an operator: write (or export) another key.")
            found, accepted = found | admin, [*accepted, operator] if accepted else []
        self._names = {key: name for key, (name, _) in found.items()}
        """Name of each key in its file; empty if it has none there. Keys of one name are equal."""
        self._operator = operator
        """Key of the operator, or None if its requests are distinguished by their address."""
        self._are_salts = num_keys > 1 if config.salt_by_key is None else config.salt_by_key
        """True if requests with different keys share no cache entries. By default they do not if
        clients have several keys, because the number of reused tokens reveals shared prompts."""
        self.accepted = list(dict.fromkeys(accepted))

    def words(self) -> str:
        """Return the number of accepted keys, and that one is short, if so."""
        least = min(map(len, self._names), default=SHORT_KEY)
        said = f"; one of {counted(least, 'character')} can be guessed: openssl rand -hex 24"
        return f"{len(self.accepted):,} accepted" + said * (least < SHORT_KEY)

    def keep_secret(self, folder: str) -> None:
        """Use the secret of ``folder``, in which the cache is kept for the next start. It is there
        in a file for its owner only, and is written if it is missing."""
        file, private = Path(folder) / SECRET_FILE, partial(os.open, mode=0o600)
        try:
            with suppress(FileExistsError), open(file, "xb", opener=private) as new:
                new.write(self._secret)
            # Neither waits for a named pipe nor follows a link, which another user may have made.
            with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb", 0) as old:
                kept = old.read(SECRET_BYTES + 1)
            if len(kept or b"") != SECRET_BYTES:
                raise OSError(errno.EINVAL, f"it does not have {SECRET_BYTES} bytes")
            self._secret = kept
        except OSError as error:
            text = "%s cannot be used (%s): entries of requests with a salt, or with one of "
            logger.warning(text + "several keys, get lost.", file, error.strerror)

    def tenant(self, scope: Scope, salt: str | None = None) -> Tenant:
        """Return the tenant of a request with ``salt`` in its body. Raises APIError 400 if its
        salts differ, or one is empty or not text. Salts are secret and namespaces are visible, so a
        namespace is a hash with a secret key."""
        name = SALT_HEADER.encode()
        values = {value for header, value in scope["headers"] if header == name}
        given = {value.decode(errors="replace") for value in values}
        given |= set() if salt is None else {salt}
        # Invalid characters are decoded as U+FFFD, which would make different salts equal.
        if len(given) > 1 or any(not one or REPLACEMENT in one for one in given):
            message = f"A request has one salt, as 'cache_salt' or {SALT_HEADER}: a text that is "
            message += "not empty and does not contain U+FFFD, the sign of invalid characters."
            raise APIError(400, message)
        key: bytes | None = scope.get("state", {}).get("api_key")
        named = "" if key is None else self._names.get(key, "")
        owner = None if key is None else named or hashlib.sha256(key).hexdigest()
        by_key = [named or key.hex()] if self._are_salts and key is not None else []
        if not by_key and not given:
            return Tenant(owner)
        parts = json.dumps([by_key, *given]).encode()
        digest = hmac.new(self._secret, parts, hashlib.sha256).hexdigest()[:32]
        return Tenant(owner, f"{scope['state']['key_name']}:{digest}" if by_key else digest)

    def refusal(self, scope: Scope) -> APIError | None:
        """Return the answer to a request that may not use its path, or None; record its key."""
        headers, path = dict(scope["headers"]), scope["path"]
        names = [name for name, _ in scope["headers"]]
        if max(names.count(b"authorization"), names.count(b"x-api-key")) > 1:
            # A proxy may have checked another one.
            return APIError(400, "A request has one Authorization and one x-api-key header.")
        if self._proxies or ":" in (scope.get("client") or ("",))[0]:
            self._name_client(scope)
        given = key_in(headers)
        is_reserved, operator = path.startswith(OPERATORS), self._operator
        has_operator = is_reserved and operator is not None  # Whose key no other site knows.
        # All keys are compared, even after a match: the time must not depend on them.
        fits = sum(hmac.compare_digest(given, key) for key in self.accepted)
        is_operators = operator is not None and hmac.compare_digest(given, operator)
        needs_api_key = bool(self.accepted) and path not in OPEN
        is_guess = given and (has_operator or needs_api_key)
        if is_guess and (wait_s := self._wait_s(scope, given, bool(fits or is_operators))):
            message = f"Too many wrong keys came from this address: wait {wait_s} s."
            return APIError(429, message, headers={"Retry-After": f"{wait_s}"})
        if has_operator and not is_operators:
            if not fits:
                return _no_key(given, "The operator's key")
            message = "This key may use the API; the cache needs the key of --admin-key-file."
            return APIError(403, message)
        host = headers.get(b"host", b"").decode("latin-1")
        if host and not has_operator and not self._answers_to(host):
            message = f"This server does not answer to the host {short(host, 200)!r}: without keys "
            message += "only to those of this machine. Start it with --allowed-host, or with keys."
            return APIError(403, message)
        if needs_api_key:
            if not fits:
                return _no_key(given, "An API key")
            name = self._names.get(given) or hashlib.sha256(given).hexdigest()[:KEY_DIGITS]
            scope["state"] |= {"api_key": given, "key_name": name}
        if not is_reserved or has_operator or _is_from_here(Request(scope)):
            return None
        message = "This path is reserved for the operator: send the request from the server's "
        message += "machine to localhost, or start the server with --admin-key-file."
        return APIError(403, message)

    def _wait_s(self, scope: Scope, key: bytes, is_right: bool) -> int:
        """Return the seconds until the address of a request may send this ``key``, 0 if it may now.
        A right key that it has sent before it may always send. O(1)."""
        address, now_s = (scope.get("client") or ("",))[0], time.monotonic()
        until_s, used = self._guesses.get(address) or (0.0, frozenset[bytes]())
        if is_right and key in used:
            return 0
        wait_s = max(until_s, now_s) + GUESS_S - now_s - MAX_GUESSES * GUESS_S
        if wait_s > 0:
            return math.ceil(wait_s)
        until_s = until_s if is_right else max(until_s, now_s) + GUESS_S
        self._guesses.put(address, (until_s, used | {key} if is_right else used), 256)
        return 0

    def _name_client(self, scope: Scope) -> None:
        """Let the client of a request be the last address that is not a trusted proxy's: its own,
        or one of those that such proxies have added."""
        lines = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
        added = b",".join(lines).decode("latin-1").split(",") if self._proxies else []
        with suppress(ValueError):
            for text in (*(scope.get("client") or ())[:1], *reversed(added)):
                client = plain_address(text.strip())
                scope["client"] = f"{client}", scope["client"][1]
                if not any(client in network for network in self._proxies):
                    return

    def _answers_to(self, host: str) -> bool:
        """Return whether requests with this ``Host`` are answered. A page of another site, whose
        name was rebound to a loopback address, could otherwise use a server without keys."""
        allowed, own = self._config.allowed_host, self._config.host
        is_open = bool(self.accepted) or not _is_local(f"//[{own}]" if ":" in own else f"//{own}")
        if (is_open and not allowed) or "*" in allowed or _is_local("//" + host):
            return True
        with suppress(ValueError):
            return urlsplit("//" + host).hostname in [one.lower() for one in allowed]
        return False


def key_in(headers: Mapping[bytes, bytes]) -> bytes:
    """Return the API key in the ``headers`` of a request, or nothing if there is none."""
    scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() != b"bearer":
        given = headers.get(b"x-api-key", b"")  # the header of Anthropic's clients
    return given.strip()


def plain_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return an address; that of IPv4 for ``::ffff:127.0.0.1``, as clients of a server at ``::``
    have it. Raises ValueError."""
    address = ipaddress.ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """Return the network of a trusted proxy, or that of its address alone. Raises ValueError."""
    with suppress(ValueError):
        return ipaddress.ip_network(text if "/" in text else plain_address(text), strict=False)
    raise ValueError(f"--trusted-proxy must be addresses or networks, as 10.0.0.0/8 (got {text}).")


def _no_key(given: bytes, needed: str) -> APIError:
    message = f"{needed} is required: send Authorization: Bearer KEY, or x-api-key: KEY."
    if given:
        message = "This key is not accepted here: check it, or ask the operator for another one."
    challenge = {"WWW-Authenticate": "Bearer"}
    return APIError(401, message, code="invalid_api_key", headers=challenge)


def _is_from_here(request: Request) -> bool:
    """Return True if the client is on this machine. A foreign page in a local browser has a
    different ``Origin``, or a different ``Host`` if its name was rebound to this address."""
    headers = request.headers
    origin = headers.get("origin")
    return (
        request.client is not None
        and ipaddress.ip_address(request.client.host).is_loopback
        and _is_local("//" + headers.get("host", ""))
        and (origin is None or _is_local(origin))
        and not any(name in headers for name in FORWARDED)
    )


def _is_local(url: str) -> bool:
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name, or brackets without an address
        return False


def _read_keys(flag: str, file: str) -> dict[bytes, tuple[str, str]]:
    """Read the keys in the ``file`` of this ``flag``, one per line, with their names and places,
    without comments (``#``)."""
    try:
        text = Path(file).read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        said = f"{flag} {file!r} cannot be read ({error.strerror}): name a file with a key, such as"
        raise ValueError(f"{said} `openssl rand -hex 24 > FILE` writes.") from error
    lines = [re.split(rb"(?:^|\s)#", line, maxsplit=1)[0] for line in text.splitlines()]
    source = f"{flag} {file}"
    places = (f"line {number} of {source}" for number in itertools.count(1))
    return _sendable(dict(zip(places, lines, strict=False)), source)


def _sendable(lines: Mapping[str, bytes], source: str) -> dict[bytes, tuple[str, str]]:
    """Return the keys in ``lines``, which are by place, each with the name behind it, or "", and
    its place. Raises ValueError without one, if a key is not printable or a name not a word, if a
    name is as long as its key, as in a line that begins with it, or if a key has two names."""
    found: dict[bytes, tuple[str, str]] = {}
    for place, line in lines.items():
        key, *more = line.split() or [b""]
        name = b" ".join(more).decode("latin-1")
        if key and not KEY.fullmatch(key):
            said = "each key must be printable ASCII; `openssl rand -hex 24` prints such a key."
            raise ValueError(f"{place}: {said}")
        if more and not KEY_NAME.fullmatch(b" ".join(more)):
            said = "the key comes first, then a name, if any: at most 40 letters, digits or .@+-_"
            raise ValueError(f"{place}: {said}")
        if key and len(key) <= len(name):  # A name is public: /metrics has it.
            said = "a line is KEY NAME, the key first, and longer than its name."
            raise ValueError(f"{place}: {said}")
        before, first = found.get(key, (name, ""))
        if before != name:
            said = f"the key of {first} has another name here: remove one of the two lines."
            raise ValueError(f"{place}: {said}")
        if key:
            found[key] = name, place
    if not found:
        raise ValueError(f"{source} has no key: write one into it.")
    return found


# --- Middleware and the log -----------------------------------------------------------------------


def _log_request(scope: Scope, status: int, is_sent: bool, began_s: float) -> None:
    """Write the line of a request. ``status`` is 0 if the client left before the answer began;
    ``is_sent``: it got the whole answer."""
    state, tokens = scope["state"], scope["state"].get("num_tokens")
    names = ("prompt_tokens", "cached_tokens", "answer_tokens")
    facts = {
        "method": scope["method"],
        "path": short(scope["path"], 200),
        "status": status or 499,
        **dict(zip(names, tokens or (None, None, None), strict=True)),
        "ms": round(1000 * (time.perf_counter() - began_s), 1),
        **{name: state.get(name) for name in ("answer_id", "request_id", "error")},
        "client": (scope.get("client") or (None,))[0],
        "key": state.get("key_name"),
        "is_sent": is_sent,
    }
    parts = (
        "{method} {path} {status}".format(**facts),
        tokens and "prompt {:,}  cached {:,}  answer {:,}".format(*tokens),
        "{ms:.0f} ms".format(**facts),
        facts["answer_id"],
        facts["client"] and f"from {facts['client']}",
        facts["key"] and f"key {facts['key']}",
        not is_sent and "not sent completely",
        facts["error"],
    )
    line = "  ".join(str(part) for part in parts if part)
    plain = "".join(letter if letter.isprintable() else "?" for letter in line)
    request_log.info("%s", plain, extra={"facts": facts})


class Requests:
    """ASGI middleware that checks keys, returns an ``X-Request-Id`` (``request-id`` for Anthropic's
    clients), counts the statuses of answers, and logs each request with facts from the state of the
    ASGI scope: ``answer_id``, ``error``, ``num_tokens`` (of prompt, cache and answer)."""

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        is_logged: bool | None,
        count: Callable[[int, str | None, Sequence[int] | None], None],
    ) -> None:
        """``count`` is called for each answer with its status, the name of the key, and the tokens
        of prompt, cache and answer, None if it is not the model's."""
        self._app, self._access, self._count = app, access, count
        self._is_logged = sys.stderr.isatty() if is_logged is None else is_logged

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        name = given if NAME.fullmatch(given) else uuid.uuid4().hex.encode()
        app, state = self._app, scope.setdefault("state", {})
        state["request_id"] = name.decode("ascii")
        if refusal := self._access.refusal(scope):
            app = refusal.response(scope)
        headers = [(b"x-request-id", name)]
        if scope["path"].startswith(ANTHROPIC):
            headers.append((b"request-id", name))
        began_s, status, is_sent = time.perf_counter(), 0, False

        async def watched(message: Message) -> None:
            nonlocal status, is_sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *headers]
            await send(message)
            is_sent = message["type"] == "http.response.body" and not message.get("more_body")

        try:
            await app(scope, receive, watched)
        except Exception:
            status = status or 500
            raise
        finally:
            if scope["path"] not in PROBES:
                self._count(status or 499, state.get("key_name"), state.get("num_tokens"))
                if self._is_logged:
                    _log_request(scope, status, is_sent, began_s)
