"""Tenants: owners of requests, and the ids that each of them has used."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import secrets
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.types import Scope

from engine.server.errors import APIError
from engine.text.json_text import REPLACEMENT

SALT_HEADER = "x-cache-salt"
"""Header for the salt of a request, as an alternative to ``cache_salt`` in the body, on every
method."""
MAX_USED = 16_384
"""Maximum number of remembered ids chosen by clients, the latest of all tenants together."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """Owner of requests, of the answers to them and of their ids."""

    key: int | None = None
    """Index of the API key among those of the server, or None if the server requires none."""
    namespace: str | None = None
    """Keyed hash of the salt, or None if the request has no salt. The cache uses only this part."""

    @property
    def is_known(self) -> bool:
        """True if a secret identifies this tenant. Without one, clients without any relation are
        the same tenant."""
        return self.key is not None or self.namespace is not None


class Tenants:
    """Distinguishes tenants. Salts are secret and namespaces are visible, so they are hashed with a
    key made at the start, which prevents guessing of salts."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def of(self, scope: Scope, salt: str | None = None) -> Tenant:
        """Return the tenant of a request with ``salt`` in its body. Raises APIError 400 if its
        salts differ, or one is not text."""
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
        if any(REPLACEMENT in one for one in given):
            # Invalid characters are decoded as this one, which would make different salts equal.
            raise APIError(
                400,
                "A salt must not contain U+FFFD, the replacement of invalid characters: "
                "choose another text.",
                param="cache_salt",
            )
        hashes = [hmac.new(self._key, one.encode(), hashlib.sha256) for one in given]
        namespace = hashes[0].hexdigest()[:32] if hashes else None
        return Tenant(scope.get("state", {}).get("api_key"), namespace)


def _header_salt(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise APIError(
            400, f"The header {SALT_HEADER} must be UTF-8.", param="cache_salt"
        ) from None


@dataclass(frozen=True, slots=True)
class AnswerId:
    """Id of one answer."""

    public: str
    """Id in the answer, unique for its tenant."""
    unique: str
    """Id of the request in the engine, unique for all tenants."""

    def request_id(self, choice: int) -> str:
        """Return the engine's id for one of the answer's choices."""
        return f"{self.unique}-{choice}" if choice else self.unique

    @classmethod
    def random(cls, kind: str, joint: str = "-") -> AnswerId:
        """Return an id that cannot be guessed."""
        name = new_id(kind, joint)
        return cls(name, name)


class AnswerIds:
    """Ids of the answers of one server, of which clients choose a part by ``request_id``. Used in
    the event loop only.

    The same id may belong to several tenants, so a tenant cannot find out the ids of others.
    """

    def __init__(self) -> None:
        self._used: OrderedDict[tuple[Tenant, str], None] = OrderedDict()
        self._numbers = itertools.count(1)

    @contextmanager
    def claimed(self, kind: str, tenant: Tenant, name: str | None) -> Iterator[AnswerId]:
        """Yield an id made of ``kind`` and the ``name`` that a client chose, with a random end if
        the tenant has used it before.

        The id counts as used unless the block raises. O(1).
        """
        if name is None:
            yield AnswerId.random(kind)
            return
        public = f"{kind}-{name}"
        if (tenant, public) in self._used:
            public = new_id(public)
        self._used[tenant, public] = None
        if len(self._used) > MAX_USED:
            self._used.popitem(last=False)
        try:
            # Another tenant may have this id at the same time, and choices end with numbers too.
            yield AnswerId(public, f"{public}#{next(self._numbers)}")
        except BaseException:
            self._used.pop((tenant, public), None)
            raise


def new_id(kind: str, joint: str = "-") -> str:
    """Return a random id for an answer or a part of one."""
    return f"{kind}{joint}{uuid.uuid4().hex}"
