"""Infinite cache of every token ever seen: a bound for every policy, and a measure for traces.

It is a plain compressed trie and shares no code with the cache that it measures.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import numpy as np

from hybridcache.lab.trace import TraceRequest
from hybridcache.tokens import Tokens, common_prefix_len


class Seen(NamedTuple):
    """Known part of one sequence."""

    length: int
    """Leading ids that some earlier sequence began with too."""
    last_visit: int | None
    """Number of the visit that came to that depth last; None where nothing was seen."""


class _VisitedNode:
    __slots__ = ("children", "ids", "last_visit")

    def __init__(self, ids: Tokens, last_visit: int) -> None:
        self.ids = ids
        self.last_visit = last_visit
        self.children: dict[int, _VisitedNode] = {}


class InfiniteCache:
    """Remembers sequences for ever.

    >>> cache = InfiniteCache()
    >>> prompts = np.array([[1, 2, 3], [1, 2, 9]], np.int32)
    >>> cache.visit(prompts[0]).length, cache.visit(prompts[1]).length
    (0, 2)
    """

    def __init__(self) -> None:
        self._roots: dict[Hashable, _VisitedNode] = {}
        self.num_visits = 0
        self.num_ids = 0
        """Tokens remembered, those that sequences share counted once."""

    def serve(self, request: TraceRequest) -> Seen:
        """Return the known part of the prompt (possibly all of it), and store prompt and answer.
        O(len)."""
        seen = self.visit(request.tokens, request.namespace)
        if len(request.output):
            self._walk(np.concatenate((request.tokens, request.output)), request.namespace)
        return seen

    def ideal_tokens(self, request: TraceRequest, unit: int) -> int:
        """Prompt tokens that could be skipped: those seen, but all but the last at most; remembers
        prompt and answer."""
        return min(self.serve(request).length * unit, request.num_tokens(unit) - 1)

    def visit(self, ids: Tokens, namespace: Hashable = None) -> Seen:
        """Return the known part of ``ids``, and store the rest. O(len(ids))."""
        self.num_visits += 1
        return self._walk(ids, namespace)

    def _walk(self, ids: Tokens, namespace: Hashable) -> Seen:
        now = self.num_visits
        node = self._roots.get(namespace)
        if node is None:
            node = self._roots[namespace] = _VisitedNode(ids[:0], now)
        depth, last_visit = 0, None
        while depth < len(ids):
            child = node.children.get(int(ids[depth]))
            if child is None:
                # A copy: a view would keep the whole prompt alive.
                node.children[int(ids[depth])] = _VisitedNode(ids[depth:].copy(), now)
                self.num_ids += len(ids) - depth
                break
            common = common_prefix_len(child.ids, ids[depth:])
            last_visit = child.last_visit
            if common < len(child.ids):
                self._split(child, common)
            child.last_visit = now
            depth += common
            node = child
        return Seen(depth, last_visit)

    @staticmethod
    def _split(node: _VisitedNode, at: int) -> None:
        lower = _VisitedNode(node.ids[at:], node.last_visit)
        lower.children = node.children
        node.ids = node.ids[:at]
        node.children = {int(lower.ids[0]): lower}
