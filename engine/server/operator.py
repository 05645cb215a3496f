"""Authorization of the operator, by key or, without one, by requests from this machine.

The operator has access to the cache of all clients.
"""

from __future__ import annotations

import hmac
import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastapi import Request

from engine.server.access import read_key
from engine.server.config import ServerConfig
from engine.server.errors import APIError

FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
"""Headers that proxies add. Clients of a proxy are not on this machine."""


@dataclass(frozen=True, slots=True)
class Operator:
    """Distinguishes the operator's requests from all others."""

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
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            # Header bytes as received: starlette decodes them as latin-1.
            is_right = hmac.compare_digest(given.strip().encode("latin-1"), self.key)
            is_bearer = scheme.lower() == "bearer"
            if not is_bearer or not is_right:
                message = (
                    "This path is reserved for the operator: send the key of --admin-key-file as "
                    "Authorization: Bearer KEY."
                )
                if is_bearer and given.strip():
                    message = (
                        "This path is reserved for the operator, and this key is wrong: send the "
                        "key of --admin-key-file."
                    )
                raise APIError(
                    401,
                    message,
                    headers={"WWW-Authenticate": "Bearer"},
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
                "machine to "
                "localhost, or start the server with "
                "--admin-key-file.",
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
