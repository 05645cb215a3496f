"""Encoding of namespaces in events, for JSON and msgpack. Distinct namespaces stay distinct.

None, strings and 64-bit integers are written unchanged. Other values become a tuple (a list on the
wire) with its type as the first entry, so that a string cannot be mistaken for it.
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
"""Encoded namespace: unchanged, or ``("tuple", ...)``, ``("int", hex)``, ``("repr", text)``."""

INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1


def write_namespace(namespace: Hashable) -> Namespace:
    """Encode a namespace for events. O(its size).

    Raises ValueError if it is not a namespace (``hybridcache.tokens``).
    """
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
    whole = int(namespace)  # type: ignore[call-overload]  # require_namespace left only ints
    return whole if INT64_MIN <= whole <= INT64_MAX else ("int", hex(whole))


def read_namespace(written: Any) -> Namespace:
    """Restore the result of ``write_namespace`` after a wire format turned tuples into lists."""
    return tuple(map(read_namespace, written)) if isinstance(written, list) else written


def _encodable(text: str) -> bool:
    """Return True if UTF-8 can encode ``text``: it has no unpaired surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
