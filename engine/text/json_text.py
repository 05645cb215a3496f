"""JSON that every reader accepts: no NaN, no Infinity, no lone surrogates, bounded nesting.

Python's module reads and writes all of these. Text from clients and models is read with this
module, and answers are written with it, so the rest of the code does not have to check for them.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import msgspec

MAX_DEPTH = 200
"""Maximum nesting of lists and objects. Python's own limit depends on the depth of the caller."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_HALVES = re.compile("[\ud800-\udfff]")
_OPENING = ("[", "{")


class JSONValueError(ValueError):
    """Valid JSON with a value that an answer cannot contain; the message names the value."""


def read_json(text: str) -> Any:
    """Parse ``text``. Lone surrogates such as ``"\\ud800"`` become U+FFFD, also in names.

    Raises ValueError if the text is not JSON, and JSONValueError for a number that is not finite or
    for more than ``MAX_DEPTH`` levels. O(len(text)).

    >>> read_json('{"cut": "\\\\ud83d", "whole": "\\\\ud83d\\\\ude00"}')
    {'cut': '\ufffd', 'whole': '😀'}
    """
    try:
        value, may_have_halves = msgspec.json.decode(text), False
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
        # Wrong or too deep, or with a lone surrogate: Python's module tells which.
        try:
            value = json.loads(text, parse_float=_read_float, parse_constant=_refuse)
        except RecursionError:
            raise _too_deep() from None
        may_have_halves = True
    if may_have_halves or sum(map(text.count, _OPENING)) > MAX_DEPTH:
        value = _settled(value)
    return value


def write_json(value: Any, *, compact: bool = False) -> str:
    """Write any ``value`` as JSON: null for a number that is not finite, U+FFFD for a lone
    surrogate. O(its size).

    >>> write_json({"logprob": float("-inf"), "text": "\\ud800"})
    '{"logprob": null, "text": "\ufffd"}'
    """
    separators = (",", ":") if compact else None
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=separators)
    except ValueError:
        value = _finite(value)
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=separators)
    return whole_text(text)


def whole_text(text: str) -> str:
    """Return ``text`` with U+FFFD in place of lone surrogates. O(len(text))."""
    return text if text.isascii() else _HALVES.sub(REPLACEMENT, text)


def has_half_characters(text: str) -> bool:
    """Return True if ``text`` contains lone surrogates, so it cannot be encoded in UTF-8.
    O(len(text))."""
    return not text.isascii() and _HALVES.search(text) is not None


def _read_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise JSONValueError(f"the number {_short(text)} is too large")
    return value


def _refuse(name: str) -> Any:
    raise JSONValueError(f"{name} is not a number of JSON")


def _too_deep() -> JSONValueError:
    return JSONValueError(f"lists and objects may be nested at most {MAX_DEPTH} levels deep")


def _settled(root: Any) -> Any:
    """Return ``root`` with lone surrogates replaced, in place if it is a list or an object. Raises
    JSONValueError if it is nested too deep."""
    holder = [root]
    left: list[tuple[Any, int]] = [(holder, 0)]
    while left:
        value, depth = left.pop()
        if depth > MAX_DEPTH:
            raise _too_deep()
        if isinstance(value, dict):
            if any(map(has_half_characters, value)):
                entries = [(whole_text(name), entry) for name, entry in value.items()]
                value.clear()
                value.update(entries)
            places: Any = value.items()
        else:
            places = enumerate(value)
        for place, entry in places:
            if isinstance(entry, str):
                if not entry.isascii():
                    value[place] = whole_text(entry)
            elif isinstance(entry, dict | list):
                left.append((entry, depth + 1))
    return holder[0]


def _finite(value: Any) -> Any:
    """Return ``value`` with None in place of numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def _short(text: str) -> str:
    return text if len(text) <= 20 else text[:17] + "..."
