"""How events name a namespace: equal ones alike, different ones apart, in JSON and in msgpack.

A cache's namespace is any hashable. None, texts and 64-bit whole numbers are written as they are.
Whatever else is a tuple (a list on the wire) whose first entry says what the rest is, so that no
text can pass for it.

>>> write_namespace(("a", 1)), write_namespace("('a', 1)")
(('tuple', 'a', 1), "('a', 1)")
>>> write_namespace(1.0), write_namespace(True), write_namespace(2.5)
(1, 1, ('repr', '2.5'))
"""

from __future__ import annotations

from collections.abc import Hashable
from fractions import Fraction
from numbers import Number
from typing import Any, TypeAlias

import numpy as np

Namespace: TypeAlias = "str | int | tuple[Namespace, ...] | None"
"""As it is, or ``("tuple", ...)``, ``("frozenset", ...)``, ``("int", hex)``, ``("fraction",
text)``, ``("repr", text)``."""

INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1


def write_namespace(namespace: Hashable) -> Namespace:
    """A namespace as events write it. Those that are equal, and so share a tree, are written the
    same. O(its size).

    What is no number, text, tuple or frozenset goes by its ``repr``, which must then tell it from
    others.
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
    if isinstance(namespace, bytes):
        return ("repr", repr(bytes(namespace)))
    if isinstance(namespace, Number | np.bool_):
        return _write_number(namespace)
    return ("repr", repr(namespace))


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


def _write_number(number: Any) -> Namespace:
    """By its value, whatever its type: 2.5, Decimal("2.5") and Fraction(5, 2) are equal."""
    if isinstance(number, np.generic):
        number = number.item()
    if isinstance(number, complex):
        if number.imag:
            return ("repr", repr(complex(number)))
        number = number.real
    try:
        exact = Fraction(number)
    except (TypeError, ValueError, OverflowError):  # infinite, or no number that a fraction knows
        return ("repr", repr(float(number)) if _is_float(number) else repr(number))
    if exact.denominator == 1:
        whole = int(exact)
        return whole if INT64_MIN <= whole <= INT64_MAX else ("int", hex(whole))
    near = _nearest(exact)
    return ("repr", repr(near)) if exact == near else ("fraction", str(exact))


def _is_float(number: Any) -> bool:
    """Whether a float is equal to it."""
    try:
        return bool(float(number) == number)
    except (TypeError, ValueError, OverflowError):
        return False


def _nearest(exact: Fraction) -> float | None:
    try:
        return float(exact)
    except OverflowError:
        return None
