"""JSON of clients and models without values that some reader rejects: no NaN, no Infinity, no lone
surrogates, bounded nesting. The rest of the code does not have to check for them."""

from __future__ import annotations

import re
from typing import Any

import msgspec

MAX_DEPTH = 200
"""Maximum nesting of lists and objects. Python's own limit depends on the depth of the caller."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_HALVES = re.compile("[\ud800-\udfff]")
_ESCAPE = re.compile(r"\\(?:u[dD][89abAB]\w\w\\u[dD][c-fC-F]\w\w|u[dD][89a-fA-F]\w\w|.)", re.DOTALL)


def read_json(text: str) -> Any:
    """Parse ``text``. Lone surrogates such as ``"\\ud800"`` become U+FFFD, also in names.

    Raises ValueError if the text is not JSON, has a number that is not finite, or has more than
    ``MAX_DEPTH`` levels. O(len(text)).

    >>> read_json('{"cut": "\\\\ud83d", "whole": "\\\\ud83d\\\\ude00"}')
    {'cut': '\ufffd', 'whole': '😀'}
    """
    too_deep = f"lists and objects may be nested at most {MAX_DEPTH} levels deep"
    try:
        try:
            value = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeEncodeError):
            value = msgspec.json.decode(_ESCAPE.sub(_whole_escape, whole_text(text)))
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError(too_deep) from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise ValueError(too_deep)
    return value


def _whole_escape(escape: re.Match[str]) -> str:
    """Return an escape, or that of U+FFFD if it is a lone surrogate."""
    return r"\ufffd" if len(escape[0]) == 6 and escape[0][1] == "u" else escape[0]


def _depth(value: Any) -> int:
    """Return the number of nested lists and objects, counting up to ``MAX_DEPTH`` + 1."""
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            break
        level = [entry for one in level for entry in (one.values() if type(one) is dict else one)]
    return depth


def whole_text(text: str) -> str:
    """Return ``text`` with U+FFFD in place of lone surrogates. O(len(text))."""
    return text if text.isascii() else _HALVES.sub(REPLACEMENT, text)
