"""Where the last tokens of a text stood before, in it or in others: kept as the text grows."""

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
POWERS = {size: pow(FACTOR, size, MASK + 1) for size in SIZES}


class SuffixIndex:
    """For every run of ``SIZES`` tokens that something followed, where it ended last.

    Runs are told apart by a hash; what is found is compared. 100 bytes or so a token and size.

    >>> index = SuffixIndex()
    >>> index.continuation(np.array([7, 1, 2, 3, 8, 9, 1, 2, 3], np.int32), 4).tolist()
    [8, 9, 1, 2]
    """

    __slots__ = ("_ends", "_hashes", "_num_indexed", "text")

    def __init__(self) -> None:
        self._ends: dict[int, dict[int, int]] = {size: {} for size in SIZES}
        self._hashes = dict.fromkeys(SIZES, 0)
        """Of the runs that end with the last token indexed; what is missing to a run counts 0."""
        self._num_indexed = 0
        self.text: Tokens | None = None
        """All of it, once it grows no more."""

    def continuation(
        self, tokens: Tokens, max_tokens: int, others: Sequence[SuffixIndex] = ()
    ) -> Tokens:
        """Up to ``max_tokens`` ids that followed the longest of the runs that ends ``tokens``;
        empty where none stood before. Those of the most tokens are looked for in ``others`` too,
        the first that has it. What reaches the end of ``tokens`` goes round.

        ``tokens`` begins with all that was given before. O(new tokens + others).
        """
        for size, key in zip(SIZES, self._index(tokens), strict=True):
            found = self._behind(size, key, tokens, tokens)
            if found is not None:
                return np.resize(found[:max_tokens], max_tokens)
            for other in others if size == SIZES[0] else ():
                assert other.text is not None, "a text that still grows"
                found = other._behind(size, key, other.text, tokens)
                if found is not None:
                    return found[:max_tokens]
        return tokens[:0]

    def _behind(self, size: int, key: int, text: Tokens, tokens: Tokens) -> Tokens | None:
        """What followed in ``text`` the run of ``size`` that ends ``tokens``, of this ``key``."""
        end = self._ends[size].get(key)
        if end is None or not np.array_equal(text[end - size : end], tokens[-size:]):
            return None
        return text[end:]

    def _index(self, tokens: Tokens) -> list[int]:
        """Every run that ends before the last token; the hashes of those that end with it."""
        until = len(tokens) - 1
        if until - self._num_indexed >= FEW:
            self._index_many(tokens[:until])
        start = self._num_indexed
        first = max(start - SIZES[0], 0)
        told = tokens[first:].tolist()
        found = []
        for size, ends in self._ends.items():
            mixed = self._hashes[size]
            for place in range(start, until + 1):
                gone = told[place - size - first] if place >= size else 0
                mixed = (mixed * FACTOR + told[place - first] - gone * POWERS[size]) & MASK
                if place < until:
                    self._hashes[size] = mixed
                    if place + 1 >= size:
                        ends[mixed] = place + 1
            found.append(mixed)
        self._num_indexed = until
        return found

    def _index_many(self, tokens: Tokens) -> None:
        """Every run."""
        for size, ends in self._ends.items():
            first = max(self._num_indexed - size + 1, 0)
            hashes = _hashes(tokens[first:], size).tolist()
            ends.update(zip(hashes, range(first + size, len(tokens) + 1), strict=True))
            self._hashes[size] = hashes[-1]
        self._num_indexed = len(tokens)


def _hashes(tokens: Tokens, size: int) -> np.ndarray:
    """Of every run of ``size`` neighbours: uint64[n - size + 1]. A polynomial, so that one token
    more needs no other."""
    count = len(tokens) - size + 1
    wide = tokens.astype(np.uint64)
    hashes = np.zeros(count, np.uint64)
    for at in range(size):
        hashes = hashes * np.uint64(FACTOR) + wide[at : at + count]
    return hashes
