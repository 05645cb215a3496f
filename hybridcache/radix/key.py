"""Token ids as bytes: how an edge is compared with a prompt and how a child is found.

An edge is int32 ids as bytes (4 a token), so that comparing a whole edge is one ``memcmp``; a split
makes two views of the same bytes. A child is found by the edge's first page: by its int id where a
page is one token (a memoryview hands it out without a numpy scalar), by its bytes where a page is
longer.
"""

from __future__ import annotations

import sys

import numpy as np

from hybridcache.tokens import Tokens

TOKEN_BYTES = 4
"""Bytes of one int32 token id."""

ChildKey = int | bytes
Edge = bytes | memoryview


def child_key(edge: Edge, page_size: int) -> ChildKey:
    """The dict key under which an edge hangs at its parent: its first page. O(page)."""
    if page_size == 1:
        return int.from_bytes(edge[:TOKEN_BYTES], sys.byteorder, signed=True)
    return bytes(edge[: page_size * TOKEN_BYTES])


def first_page(tokens: Tokens, at: int, page_size: int) -> ChildKey:
    """The key of the child that ``tokens`` go on to from ``at``. O(page)."""
    return tokens.item(at) if page_size == 1 else tokens[at : at + page_size].tobytes()


def edge_tokens(edge: Edge) -> Tokens:
    """The ids of an edge: int32 view, read-only. O(1)."""
    return np.frombuffer(edge, dtype=np.int32)
