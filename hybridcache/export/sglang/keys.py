"""SGLang's keys as ours: ``RadixKey`` to tokens and a namespace."""

from __future__ import annotations

from array import array
from collections.abc import Hashable
from typing import Any

import numpy as np

from hybridcache.tokens import Tokens

MAX_TOKEN = 2**31 - 1
NO_TOKEN = -1
"""No id: follows a key whose own next token is not known, and is equal to nothing cached."""


def namespace_of(extra_key: str | None, cache_salt: str | None) -> Hashable:
    """Requests with another adapter or another salt share nothing."""
    return None if extra_key is None and cache_salt is None else (extra_key, cache_salt)


def tokens_of(ids: array[int], num_tokens: int) -> Tokens:
    """The first ``num_tokens`` of ``ids`` (int64) as int32[n]; n is less where an id does not fit,
    so that nothing from there on is cached or found. O(n)."""
    wide = np.frombuffer(ids, np.int64)[:num_tokens]
    if len(wide) and wide.max() > MAX_TOKEN:
        wide = wide[: int((wide > MAX_TOKEN).argmax())]
    return wide.astype(np.int32)


def prompt_of(key: Any) -> Tokens:
    """The prompt behind ``key``, which holds what may be reused of it: one token more. O(n)."""
    num_tokens = len(key)
    tokens = tokens_of(key.token_ids, num_tokens + 1)
    if len(tokens) > num_tokens:
        return tokens
    return np.append(tokens, np.int32(NO_TOKEN))
