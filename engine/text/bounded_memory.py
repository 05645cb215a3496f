"""Values by key in a bounded number of bytes: pieces of text, answers, responses, explanations."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

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
            self._remove(key)
            self._values[key] = value, num_bytes
            self.num_bytes += num_bytes
            while self.num_bytes > self.limit_bytes:
                self._remove(next(iter(self._values)))

    def delete(self, key: Key) -> bool:
        """Remove the value of ``key``. Returns False if there is none. O(1)."""
        with self._lock:
            return self._remove(key)

    def listed(self) -> list[tuple[Key, Value]]:
        """Return all (key, value), the least recently used first. O(values)."""
        with self._lock:
            return [(key, value) for key, (value, _) in self._values.items()]

    def check(self) -> None:
        """Raise AssertionError if the recorded size is wrong. O(values)."""
        assert sum(size for _, size in self._values.values()) == self.num_bytes <= self.limit_bytes

    def _remove(self, key: Key) -> bool:
        _, num_bytes = self._values.pop(key, (None, 0))
        self.num_bytes -= num_bytes
        return num_bytes > 0
