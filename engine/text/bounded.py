"""Bounds on what clients send and what is remembered: JSON that no reader rejects (no NaN, no
Infinity, no lone surrogates, bounded nesting), and values in a bounded number of bytes."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from typing import Any, Generic, TypeVar

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


def _depth(value: object) -> int:
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


Key = TypeVar("Key")
Value = TypeVar("Value")


class BoundedMemory(Generic[Key, Value]):
    """Values in ``limit_bytes``; the least recently used ones are evicted. Thread-safe.

    >>> memory = BoundedMemory[str, int](100)
    >>> for name in "abc":
    ...     memory.put(name, 1, num_bytes=40)
    >>> memory.get("a"), memory.get("b"), memory.num_bytes
    (None, 1, 80)
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._values: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        """Value and size by key, the least recently used first."""
        self._lock = threading.Lock()
        self.num_bytes = 0

    def get(self, key: Key, *, is_use: bool = True) -> Value | None:
        """Return the value of ``key``, or None. It is now the most recently used one, unless
        ``is_use`` is False. O(1)."""
        with self._lock:
            if key not in self._values:
                return None
            if is_use:
                self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: Key, value: Value, num_bytes: int) -> None:
        """Store ``value`` of ``num_bytes`` and replace an earlier one of this ``key``. Does nothing
        if it is larger than the limit. O(1) amortised."""
        if num_bytes > self.limit_bytes:
            return
        with self._lock:
            if key in self._values:
                self._drop(key)
            size = self.num_bytes + num_bytes
            self._values[key], self.num_bytes = (value, num_bytes), size
            while self.num_bytes > self.limit_bytes:
                self._drop(next(iter(self._values)))

    def _drop(self, key: Key) -> None:
        # The size follows each change without an allocation, which could fail in between.
        size = self.num_bytes - self._values[key][1]
        del self._values[key]
        self.num_bytes = size

    def delete(self, key: Key) -> bool:
        """Remove the value of ``key``. Returns False if there is none. O(1)."""
        with self._lock:
            if has_value := key in self._values:
                self._drop(key)
            return has_value

    def listed(self) -> list[tuple[Key, Value]]:
        """Return all (key, value), the least recently used first. O(values)."""
        with self._lock:
            return [(key, value) for key, (value, _) in self._values.items()]

    def check(self) -> None:
        """Raise AssertionError if the recorded size is wrong. O(values)."""
        assert sum(size for _, size in self._values.values()) == self.num_bytes <= self.limit_bytes
