"""An answer's token ids, which come a few at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hybridcache.tokens import Tokens


class GrowingTokens:
    """Token ids so far."""

    def __init__(self) -> None:
        self._buffer = np.empty(64, np.int32)
        self._num_tokens = 0

    def __len__(self) -> int:
        return self._num_tokens

    def extended(self, new: Sequence[int] | Tokens) -> Tokens:
        """All so far, int32, ``new`` among them; what was given out before stays as it is.
        O(new tokens), amortised."""
        end = self._num_tokens + len(new)
        if end > len(self._buffer):
            self._buffer = np.concatenate((self._buffer, np.empty(end, np.int32)))
        self._buffer[self._num_tokens : end] = new
        self._num_tokens = end
        return self._buffer[:end]
