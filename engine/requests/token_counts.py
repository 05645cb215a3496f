"""Counts of the tokens in an answer, updated as the answer grows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hybridcache.tokens import Tokens


class TokenCounts:
    """Distinct tokens of an answer with their counts, and tokens of its prompt with count 0.

    >>> counts = TokenCounts(np.array([7, 9, 7], np.int32))
    >>> counts.count(np.array([9, 9, 4], np.int32))
    >>> counts.ids.tolist(), counts.numbers.tolist()
    ([7, 9, 4], [0, 2, 1])
    """

    __slots__ = ("_at", "_ids", "_numbers", "num_counted")

    def __init__(self, prompt: Tokens) -> None:
        """Count no answer yet. O(prompt log prompt), once per request."""
        self._ids: npt.NDArray[np.int64] = np.unique(prompt).astype(np.int64)
        self._numbers: npt.NDArray[np.int32] = np.zeros(len(self._ids), np.int32)
        self._at = {token: at for at, token in enumerate(self._ids.tolist())}
        self.num_counted = 0
        """Number of answer tokens that are counted."""

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """Distinct tokens: int64[n], a view."""
        return self._ids[: len(self._at)]

    @property
    def numbers(self) -> npt.NDArray[np.int32]:
        """Number of occurrences of each token in the answer: int32[n], a view."""
        return self._numbers[: len(self._at)]

    def count(self, output: Tokens) -> None:
        """Count the new tokens of ``output``, which begins with all counted ones. O(new tokens)."""
        for token in output[self.num_counted :].tolist():
            at = self._at.setdefault(token, len(self._at))
            if at == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros(at + 64, np.int64)])
                self._numbers = np.concatenate([self._numbers, np.zeros(at + 64, np.int32)])
            self._ids[at] = token
            self._numbers[at] += 1
        self.num_counted = len(output)

    def ahead(self, tokens: Tokens) -> TokenCounts:
        """Return a copy that also counts ``tokens``, as a continuation of the answer. O(distinct
        tokens)."""
        copy = TokenCounts(tokens[:0])
        copy._at = self._at.copy()
        copy._ids, copy._numbers = self.ids.copy(), self.numbers.copy()
        copy.count(tokens)
        copy.num_counted = self.num_counted + len(tokens)
        return copy

    def check(self, prompt: Tokens, output: Tokens) -> None:
        """Raise AssertionError unless the counts equal those of the whole ``prompt`` and
        ``output``. O(both)."""
        tokens, numbers = np.unique(output, return_counts=True)
        expected = dict.fromkeys(np.unique(prompt).tolist(), 0)
        expected |= dict(zip(tokens.tolist(), numbers.tolist(), strict=True))
        assert dict(zip(self.ids.tolist(), self.numbers.tolist(), strict=True)) == expected
        assert self.num_counted == len(output)
