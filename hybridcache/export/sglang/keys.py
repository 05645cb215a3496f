"""Conversion of SGLang's ``RadixKey`` to tokens and a namespace."""

from __future__ import annotations

from array import array
from collections.abc import Hashable
from typing import Any

import numpy as np

from hybridcache.tokens import Tokens

MAX_TOKEN = 2**31 - 1
NO_TOKEN = -1
"""Pseudo-token that equals no cached token. Appended if the next token of a key is unknown."""


def namespace_of(extra_key: str | None, cache_salt: str | None) -> Hashable:
    """Return the namespace of an adapter and a salt. Different ones share no prefixes."""
    return None if extra_key is None and cache_salt is None else (extra_key, cache_salt)


def tokens_of(ids: array[int], num_tokens: int) -> Tokens:
    """Return the first ``num_tokens`` of ``ids`` (int64) as int32[n]. O(n).

    The result ends before the first id that does not fit, so nothing after it is cached or found.
    """
    wide = np.frombuffer(ids, np.int64)[:num_tokens]
    if len(wide) and wide.max() > MAX_TOKEN:
        wide = wide[: int((wide > MAX_TOKEN).argmax())]
    return wide.astype(np.int32)


def prompt_of(key: Any) -> Tokens:
    """Return the prompt of ``key``: its reusable tokens and the token after them. O(n)."""
    num_tokens = len(key)
    tokens = tokens_of(key.token_ids, num_tokens + 1)
    if len(tokens) > num_tokens:
        return tokens
    return np.append(tokens, np.int32(NO_TOKEN))
