"""Names of namespaces in events: equal ones alike, different ones apart, in JSON and in msgpack.

None, texts and 64-bit whole numbers are written as they are. Other values become a tuple (a list on
the wire) whose first entry says how to read the rest, so that no text can pass for it.

>>> write_namespace(("a", 1)), write_namespace("('a', 1)")
(('tuple', 'a', 1), "('a', 1)")
>>> write_namespace(b"salt"), write_namespace(2**64)
(('repr', "b'salt'"), ('int', '0x10000000000000000'))
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, TypeAlias

from hybridcache.tokens import require_namespace

Namespace: TypeAlias = "str | int | tuple[Namespace, ...] | None"
"""As it is, or ``("tuple", ...)``, ``("int", hex)``, ``("repr", text)``."""

INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1


def write_namespace(namespace: Hashable) -> Namespace:
    """Return a namespace as events write it. ValueError: it is none (``hybridcache.tokens``).
    O(its size)."""
    if namespace is None:
        return None
    if isinstance(namespace, str):
        text = str.__str__(namespace)
        return text if _encodable(text) else ("repr", repr(text))
    if isinstance(namespace, tuple):
        return ("tuple", *map(write_namespace, namespace))
    require_namespace(namespace)
    if isinstance(namespace, bytes):
        return ("repr", repr(bytes(namespace)))
    assert isinstance(namespace, int)
    whole = int(namespace)
    return whole if INT64_MIN <= whole <= INT64_MAX else ("int", hex(whole))


def read_namespace(written: Any) -> Namespace:
    """Return what ``write_namespace`` gave, after a wire has made lists of its tuples."""
    return tuple(map(read_namespace, written)) if isinstance(written, list) else written


def _encodable(text: str) -> bool:
    """Return whether UTF-8 can carry ``text``: no half of a surrogate pair is in it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
