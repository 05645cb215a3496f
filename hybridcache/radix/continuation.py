"""Lookup of the tokens that followed a path before, ghosts included."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import islice

import numpy as np

from hybridcache.radix.tree import TOKEN_BYTES, Family, RadixNode, edge_tokens, first_page, members
from hybridcache.tokens import Tokens

MAX_BRANCHES = 64
"""Number of children, the newest, that are compared if several continue alike."""
NOTHING: Tokens = np.empty(0, np.int32)
NOTHING.setflags(write=False)


def continuation(node: RadixNode, tokens: Tokens, max_tokens: int, page_size: int) -> Tokens:
    """Return up to ``max_tokens`` ids that followed ``tokens`` after the end of ``node`` before.

    The result is empty if they never did. Changes nothing. At a fork, the child that was used last
    is followed, resident ones before ghosts. O(length of ``tokens``, compared as bytes, plus nodes
    on the path, plus up to ``MAX_BRANCHES`` per fork).
    """
    rest, at, found = tokens.tobytes(), 0, []
    num_missing = max_tokens
    while num_missing > 0:
        child = _next(node, tokens, at, page_size)
        if child is None:
            break
        end = min(at + len(child.edge) // TOKEN_BYTES, len(tokens))
        shared = (end - at) * TOKEN_BYTES
        if child.edge[:shared] != rest[at * TOKEN_BYTES : end * TOKEN_BYTES]:
            break
        if shared < len(child.edge):
            found.append(edge_tokens(child.edge[shared:])[:num_missing])
            num_missing -= len(found[-1])
        node, at = child, end
    return np.concatenate(found) if found else NOTHING


def _next(node: RadixNode, tokens: Tokens, at: int, page_size: int) -> RadixNode | None:
    """Return the child on which ``tokens`` continue at ``at``, or None.

    If less than a page remains, this is the child used last of those that begin with it.
    """
    families = (node.children, node.ghosts)
    if len(tokens) - at >= page_size:
        key = first_page(tokens, at, page_size)
        for family in families:
            child = family.get(key) if isinstance(family, dict) else family
            if child is not None and child.key == key:
                return child
        return None
    start = tokens[at:].tobytes()
    alike = [
        child
        for family in families
        for child in _newest(family)
        if child.edge[: len(start)] == start
    ]
    return max(alike, key=_last_used, default=None)


def _newest(family: Family) -> Iterable[RadixNode]:
    if isinstance(family, dict):
        return islice(reversed(family.values()), MAX_BRANCHES)
    return members(family)


def _last_used(node: RadixNode) -> int:
    return -sys.maxsize if node.kv is None else node.kv.last_used
