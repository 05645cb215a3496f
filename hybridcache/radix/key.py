"""Token ids as bytes: how an edge is compared with a prompt and how a child is found.

An edge is int32 ids as bytes (4 a token), so that comparing a whole edge is one ``memcmp``; a split makes two views of the
same bytes. A child is found by the edge's first page: by its int id where a page is one token
(a memoryview hands it out without a numpy scalar), by its bytes where a page is longer.
"""

from __future__ import annotations

import sys

import numpy as np

from hybridcache.interface import Tokens

INT32 = np.dtype(np.int32)
TOKEN_BYTES = 4
"""Bytes of one int32 token id."""

ChildKey = int | bytes
Edge = bytes | memoryview


def require_int32(array: object, what: str) -> None:
    """ValueError unless ``array`` is int32[n]: bytes of another type would be taken for other ids. O(1)."""
    if not isinstance(array, np.ndarray):
        kind = type(array).__name__
    elif array.dtype != INT32 or array.ndim != 1:
        kind = f"{array.dtype} of shape {array.shape}"
    else:
        return
    raise ValueError(f"{what} must be a numpy array int32[n], not {kind}: convert them first")


def child_key(edge: Edge, page_size: int) -> ChildKey:
    """The dict key under which an edge hangs at its parent: its first page. O(page)."""
    if page_size == 1:
        return int.from_bytes(edge[:TOKEN_BYTES], sys.byteorder, signed=True)
    return bytes(edge[: page_size * TOKEN_BYTES])


def first_page(tokens: Tokens, at: int, page_size: int) -> ChildKey:
    """The key of the child that ``tokens`` go on to from ``at``. O(page)."""
    return tokens.item(at) if page_size == 1 else tokens[at : at + page_size].tobytes()


def common_prefix_len(edge: Edge, tokens: Tokens, page_size: int) -> int:
    """Tokens that ``edge`` and ``tokens`` (int32[n]) share from their starts, whole pages only. O(shorter of the two).

    >>> import numpy as np
    >>> prompt = np.array([5, 6, 7, 8], dtype=np.int32)
    >>> common_prefix_len(prompt[:3].tobytes(), prompt, page_size=1)
    3
    >>> common_prefix_len(prompt[:3].tobytes(), prompt, page_size=2)
    2
    """
    ids = np.frombuffer(edge, dtype=np.int32)
    shorter = min(len(ids), len(tokens))
    differs = ids[:shorter] != tokens[:shorter]
    first = int(differs.argmax()) if shorter else 0
    shared = first if shorter and differs[first] else shorter
    return shared - shared % page_size


def edge_tokens(edge: Edge) -> Tokens:
    """The ids of an edge: int32 view, read-only. O(1)."""
    return np.frombuffer(edge, dtype=np.int32)
