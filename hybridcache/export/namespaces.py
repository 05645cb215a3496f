"""How events name a namespace: equal ones alike, different ones apart, in JSON and in msgpack.

A cache's namespace is any hashable. None, texts and 64-bit whole numbers are written as they are. Whatever else is a tuple
(a list on the wire) whose first entry says what the rest is, so that no text can pass for it.

>>> write_namespace(("a", 1)), write_namespace("('a', 1)")
(('tuple', 'a', 1), "('a', 1)")
>>> write_namespace(1.0), write_namespace(True), write_namespace(2.5)
(1, 1, ('repr', '2.5'))
"""

from __future__ import annotations

from collections.abc import Hashable
from numbers import Number
from typing import Any, TypeAlias

Namespace: TypeAlias = "str | int | tuple[Namespace, ...] | None"
"""As it is, or ``("tuple", ...)``, ``("frozenset", ...)``, ``("int", hex)``, ``("repr", text)``."""

INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1


def write_namespace(namespace: Hashable) -> Namespace:
    """A namespace as events write it. Those that are equal, and so share a tree, are written the same. O(its size).

    What is no number, text, tuple or frozenset goes by its ``repr``, which must then tell it from others.
    """
    if namespace is None:
        return None
    if isinstance(namespace, str):
        text = str.__str__(namespace)
        return text if _encodable(text) else ("repr", repr(text))
    if isinstance(namespace, tuple):
        return ("tuple", *map(write_namespace, namespace))
    if isinstance(namespace, frozenset):
        return ("frozenset", *sorted(map(write_namespace, namespace), key=repr))
    whole = _whole(namespace)
    if whole is None:
        return ("repr", repr(namespace))
    return whole if INT64_MIN <= whole <= INT64_MAX else ("int", hex(whole))


def read_namespace(written: Any) -> Namespace:
    """What ``write_namespace`` gave, after a wire has made lists of its tuples."""
    return tuple(map(read_namespace, written)) if isinstance(written, list) else written


def _encodable(text: str) -> bool:
    """False: half of a surrogate pair is in it, which UTF-8 can not carry."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _whole(namespace: Any) -> int | None:
    """The whole number it equals; None if it equals none."""
    if not isinstance(namespace, Number):
        return None
    try:
        whole = int(namespace)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        return None
    return whole if whole == namespace else None
