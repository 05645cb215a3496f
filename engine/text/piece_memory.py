"""Stretches of text that were encoded lately, so that a chat's next turn costs only what is new."""

from __future__ import annotations

import sys
import threading
from array import array
from collections import OrderedDict
from collections.abc import Hashable

ENTRY_BYTES = 256
"""What a remembered stretch takes beside its text and its ids."""


class PieceMemory:
    """Ids of stretches of text, the latest used of each namespace, in ``limit_bytes`` together.
    Safe from any thread."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._known: OrderedDict[tuple[Hashable, str], array[int]] = OrderedDict()
        self._lock = threading.Lock()
        self.num_bytes = 0

    def get(self, namespace: Hashable, piece: str) -> array[int] | None:
        with self._lock:
            known = self._known.get((namespace, piece))
            if known is not None:
                self._known.move_to_end((namespace, piece))
            return known

    def put(self, namespace: Hashable, piece: str, token_ids: array[int]) -> None:
        """Remember ``token_ids``, and forget what was not used for longest. One that would take a
        quarter is not kept."""
        size = _size(piece, token_ids)
        if size > self._limit_bytes // 4:
            return
        with self._lock:
            if (namespace, piece) in self._known:
                return
            self._known[namespace, piece] = token_ids
            self.num_bytes += size
            while self.num_bytes > self._limit_bytes:
                (_, oldest), ids = self._known.popitem(last=False)
                self.num_bytes -= _size(oldest, ids)

    def check(self) -> None:
        """AssertionError: the books are wrong. O(pieces)."""
        sizes = [_size(piece, ids) for (_, piece), ids in self._known.items()]
        assert sum(sizes) == self.num_bytes <= self._limit_bytes


def _size(piece: str, token_ids: array[int]) -> int:
    return sys.getsizeof(piece) + sys.getsizeof(token_ids) + ENTRY_BYTES
