"""Where the last tokens of a text stood in it before, kept as the text grows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hybridcache.tokens import Tokens

SIZES = (6, 3)
"""Tokens that must agree, the most first. Fewer than three agree by chance too often."""
FEW = 16
"""Tokens; fewer are hashed one by one, for numpy would take longer."""
FACTOR = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


class SuffixIndex:
    """For every run of ``SIZES`` tokens that something followed, where it ended last.

    Runs are told apart by a hash; what is found is compared. 100 bytes or so a token and size.

    >>> index = SuffixIndex()
    >>> index.continuation(np.array([7, 1, 2, 3, 8, 9, 1, 2, 3], np.int32), 4).tolist()
    [8, 9, 1, 2]
    """

    __slots__ = ("_ends", "_num_indexed")

    def __init__(self) -> None:
        self._ends: tuple[dict[int, int], ...] = tuple({} for _ in SIZES)
        self._num_indexed = 0

    def continuation(self, tokens: Tokens, max_tokens: int) -> Tokens:
        """Up to ``max_tokens`` ids that followed the longest of the runs that ends ``tokens``;
        empty where none stood there before. What reaches the end of ``tokens`` goes round.

        ``tokens`` begins with all that was given before. O(new tokens).
        """
        self._index(tokens)
        for size, ends in zip(SIZES, self._ends, strict=True):
            if len(tokens) < size:
                continue
            last = tokens[-size:]
            end = ends.get(_hash(last.tolist()))
            if end is not None and np.array_equal(tokens[end - size : end], last):
                return np.resize(tokens[end : end + max_tokens], max_tokens)
        return tokens[:0]

    def _index(self, tokens: Tokens) -> None:
        """Every run that ends before the last token."""
        until = len(tokens) - 1
        for size, ends in zip(SIZES, self._ends, strict=True):
            first = max(self._num_indexed - size + 1, 0)
            new = tokens[first:until]
            if len(new) < FEW:
                told = new.tolist()
                hashes = [_hash(told[at : at + size]) for at in range(len(told) - size + 1)]
            else:
                hashes = _hashes(new, size).tolist()
            ends.update(zip(hashes, range(first + size, until + 1), strict=True))
        self._num_indexed = max(self._num_indexed, until)


def _hash(run: Sequence[int]) -> int:
    """Of one run, as ``_hashes``."""
    mixed = 0
    for token in run:
        mixed = ((mixed ^ token) * FACTOR) & MASK
        mixed ^= mixed >> 29
    return mixed


def _hashes(tokens: Tokens, size: int) -> np.ndarray:
    """Of every run of ``size`` neighbours: uint64[n - size + 1]."""
    count = max(len(tokens) - size + 1, 0)
    wide = tokens.astype(np.uint64)
    hashes = np.zeros(count, np.uint64)
    for at in range(size):
        hashes = (hashes ^ wide[at : at + count]) * np.uint64(FACTOR)
        hashes ^= hashes >> np.uint64(29)
    return hashes
