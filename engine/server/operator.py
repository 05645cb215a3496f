"""Who may look into the cache of all clients, and end it: whoever has the key, or else this machine
alone."""

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
"""Headers of a proxy, whose clients are not this machine's."""


@dataclass(frozen=True, slots=True)
class Operator:
    """Knows the operator's requests from all others."""

    key: bytes | None

    @classmethod
    def of(cls, config: ServerConfig) -> Operator:
        """ValueError: the file of the key is not there, or empty."""
        if config.admin_key_file is None:
            return cls(None)
        return cls(read_key("admin_key_file", config.admin_key_file))

    def check(self, request: Request) -> None:
        """APIError 401, 403: it is not the operator who asks.

        Without a key: a client of this machine, by its address, that names this machine as the
        host. A foreign page in a browser here has its own ``Origin``, or its own ``Host`` where it
        has bent a name to this address.
        """
        if self.key is not None:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            # Header bytes as they came: latin-1 is what starlette read them as.
            is_right = hmac.compare_digest(given.strip().encode("latin-1"), self.key)
            if scheme.lower() != "bearer" or not is_right:
                raise APIError(
                    401,
                    "This path is the operator's: send the key of --admin-key-file as "
                    "Authorization: Bearer KEY.",
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
                "This path is the operator's: ask on the server's own machine, as localhost, or "
                "start it with "
                "--admin-key-file.",
            )


def _host_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:  # brackets that hold no address
        return None


def _is_here(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return host is not None and ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
