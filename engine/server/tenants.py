"""Tenants: which requests belong together, and the ids that each of them has used."""

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
"""Names the salt of a request in place of ``cache_salt`` in its body, on every method."""
MAX_USED = 16_384
"""Ids chosen by clients that are remembered, the latest of all tenants together."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """Owner of requests, of the answers to them and of their ids."""

    key: int | None = None
    """Place of the API key among those of the server; None if the server asks for none."""
    namespace: str | None = None
    """Keyed hash of the salt; None if the request has no salt. The cache knows this part alone."""

    @property
    def is_known(self) -> bool:
        """Whether a secret tells this tenant from others: without one, clients that do not know
        each other are the same tenant."""
        return self.key is not None or self.namespace is not None


class Tenants:
    """Tells tenants apart. Salts are secrets and namespaces are shown: a key made at the start
    stands between them, so that nobody can try salts."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def of(self, scope: Scope, salt: str | None = None) -> Tenant:
        """Return the tenant of a request whose body names ``salt``. APIError 400: its salts differ,
        or one is not text."""
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
            # Unreadable characters are read as this one, which would make different salts equal.
            raise APIError(
                400,
                "A salt must not hold U+FFFD, the sign for characters that could not be read: "
                "choose other text.",
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
    """Stands in the answer. No other answer of its tenant has it."""
    unique: str
    """The engine's id of the request: nothing else has it, of whatever tenant."""

    def request_id(self, choice: int) -> str:
        """Return the engine's id for one of the answer's choices."""
        return f"{self.unique}-{choice}" if choice else self.unique

    @classmethod
    def random(cls, kind: str, joint: str = "-") -> AnswerId:
        """Return an id that nobody can guess."""
        name = new_id(kind, joint)
        return cls(name, name)


class AnswerIds:
    """Ids of the answers of one server, of which clients choose a part by ``request_id``. Only an
    event loop calls it.

    The same id may belong to several tenants: none learns which ids another has.
    """

    def __init__(self) -> None:
        self._used: OrderedDict[tuple[Tenant, str], None] = OrderedDict()
        self._numbers = itertools.count(1)

    @contextmanager
    def claimed(self, kind: str, tenant: Tenant, name: str | None) -> Iterator[AnswerId]:
        """Yield an id that begins with ``kind`` and goes on with the ``name`` that a client chose;
        if the tenant has used it before, it gets a random end. It is used unless the block raises.
        O(1)."""
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
            # Another tenant may have this id at the same time, and choices end in numbers too.
            yield AnswerId(public, f"{public}#{next(self._numbers)}")
        except BaseException:
            self._used.pop((tenant, public), None)
            raise


def new_id(kind: str, joint: str = "-") -> str:
    """Return a random id for an answer or a part of one."""
    return f"{kind}{joint}{uuid.uuid4().hex}"
