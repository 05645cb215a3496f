"""Which requests belong to one conversation, by their tokens alone: a prompt that begins with all
that an earlier one is known to leave to its next turn follows it."""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Hashable
from zlib import crc32

from hybridcache.tokens import Tokens

MAX_KNOWN = 512
"""Conversations that can be followed; the ones that came last."""


class Conversations:
    """Numbers them in the order in which they began.

    >>> import numpy as np
    >>> talks = Conversations()
    >>> first = np.arange(10, dtype=np.int32)
    >>> talks.of(first, 8, None), talks.of(np.arange(30, dtype=np.int32), 28, None)
    (1, 1)
    >>> talks.of(first[::-1].copy(), 8, None), talks.of(first, 8, "tenant")
    (2, 3)
    """

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[int, int, Hashable], int] = OrderedDict()
        self._lengths: list[int] = []
        """Of all known beginnings, ascending, each as often as it is there."""
        self._num_begun = 0

    def of(self, prompt: Tokens, stable_len: int, namespace: Hashable) -> int:
        """The conversation of ``prompt``, of which the next turn shares ``stable_len``. O(tokens +
        known)."""
        data = memoryview(prompt.astype("<i4", copy=False).tobytes())
        found: int | None = None
        at = checksum = 0
        for length in self._lengths:
            if length > len(prompt):
                break
            if length > at:
                checksum = crc32(data[4 * at : 4 * length], checksum)
                at = length
            found = self._known.get((length, checksum, namespace), found)
        if found is None:
            self._num_begun += 1
            found = self._num_begun
        if stable_len:
            self._learn((stable_len, crc32(data[: 4 * stable_len]), namespace), found)
        return found

    def _learn(self, beginning: tuple[int, int, Hashable], conversation: int) -> None:
        if beginning not in self._known:
            insort(self._lengths, beginning[0])
        self._known[beginning] = conversation
        self._known.move_to_end(beginning)
        if len(self._known) > MAX_KNOWN:
            (length, _, _), _ = self._known.popitem(last=False)
            self._lengths.remove(length)
