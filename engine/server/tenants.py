"""Tenants: which requests belong together, and the ids that each of them has used."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakValueDictionary

from starlette.types import Scope

from engine.errors import DuplicateId
from engine.server.errors import APIError, of_failure
from engine.text.json_text import REPLACEMENT

SALT_HEADER = "x-cache-salt"
"""Names the salt of a request in place of ``cache_salt`` in its body, on every method."""
MAX_USED = 16_384
"""Ids chosen by clients that are remembered, of all tenants together."""


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


class AnswerId:
    """Id of one answer, taken until it is released."""

    def __init__(
        self,
        public: str,
        request_id: str | None = None,
        on_submit: Callable[[], None] = lambda: None,
    ) -> None:
        """``request_id``: the engine's id, if ``public`` alone is not unique."""
        self.public = public
        """Stands in the answer."""
        self._request_id = request_id or public
        self._on_submit = on_submit
        self.is_taken = True

    def request_id(self, choice: int) -> str:
        """Return the engine's id for one of the answer's choices, which nothing else has."""
        return f"{self._request_id}-{choice}" if choice else self._request_id

    def submitted(self) -> None:
        """The engine has taken the request: a later one of its tenant gets another id."""
        self._on_submit()

    def release(self) -> None:
        """The answer has ended, or never began."""
        self.is_taken = False


class AnswerIds:
    """Ids of the answers of one server. Only an event loop calls it.

    Clients choose a part of an id by ``request_id``. The same id may belong to several tenants:
    none learns which ids another has.
    """

    def __init__(self) -> None:
        self._taken: WeakValueDictionary[tuple[Tenant, str], AnswerId] = WeakValueDictionary()
        self._used: OrderedDict[tuple[Tenant, str], None] = OrderedDict()
        self._num_claimed = 0

    def claim(self, kind: str, tenant: Tenant, name: str | None = None) -> AnswerId:
        """Take an id that begins with ``kind``, by the ``name`` that a client chose; one that the
        tenant has used before gets an end of its own. APIError 409: an answer with this id is
        under way."""
        public = new_id(kind, name=name)
        if name is None:
            return AnswerId(public)
        place = tenant, public
        other = self._taken.get(place)
        if other is not None and other.is_taken:
            raise of_failure(DuplicateId(name), param="request_id")
        if place in self._used:
            place = tenant, new_id(public)
        self._num_claimed += 1
        # Another tenant may have the same id at the same time, and choices end in numbers too.
        request_id = f"{place[1]}#{self._num_claimed}"
        claimed = AnswerId(place[1], request_id, lambda: self._remember(place))
        self._taken[place] = claimed
        return claimed

    def _remember(self, place: tuple[Tenant, str]) -> None:
        self._used[place] = None
        if len(self._used) > MAX_USED:
            self._used.popitem(last=False)


def new_id(kind: str, joint: str = "-", name: str | None = None) -> str:
    """Return an id for an answer or a part of one, random unless it has a ``name``."""
    return f"{kind}{joint}{name or uuid.uuid4().hex}"
