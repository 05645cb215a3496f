"""Infinite cache of every token ever seen: a bound for every policy, and a measure for traces."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import numpy as np

from hybridcache.lab.prefix_tree import PrefixNode, grow, new_root, walk
from hybridcache.lab.trace import TraceRequest
from hybridcache.tokens import Tokens


class Seen(NamedTuple):
    """Known part of one sequence."""

    length: int
    """Leading ids that some earlier sequence began with too."""
    last_visit: int | None
    """Number of the visit that came to that depth last; None where nothing was seen."""


class InfiniteCache:
    """Remembers sequences for ever.

    >>> cache = InfiniteCache()
    >>> prompts = np.array([[1, 2, 3], [1, 2, 9]], np.int32)
    >>> cache.visit(prompts[0]).length, cache.visit(prompts[1]).length
    (0, 2)
    """

    def __init__(self) -> None:
        self._roots: dict[Hashable, PrefixNode] = {}
        self.num_visits = 0
        self.num_ids = 0
        """Tokens remembered, those that sequences share counted once."""

    def serve(self, request: TraceRequest) -> Seen:
        """Return the known part of the prompt (possibly all of it), and store prompt and answer.
        O(len)."""
        seen = self.visit(request.tokens, request.namespace)
        if len(request.output):
            self._store(np.concatenate((request.tokens, request.output)), request.namespace)
        return seen

    def ideal_tokens(self, request: TraceRequest, unit: int) -> int:
        """Prompt tokens that could be skipped: those seen, but all but the last at most; remembers
        prompt and answer."""
        return min(self.serve(request).length * unit, request.num_tokens(unit) - 1)

    def visit(self, ids: Tokens, namespace: Hashable = None) -> Seen:
        """Return the known part of ``ids``, and store the rest. O(len(ids))."""
        self.num_visits += 1
        return self._store(ids, namespace)

    def _store(self, ids: Tokens, namespace: Hashable) -> Seen:
        node, length = walk(self._roots.setdefault(namespace, new_root()), ids)
        last_visit = node.time if length else None
        end, num_new, _ = grow(node, length, ids)
        self.num_ids += num_new
        for visited in end.path():
            visited.time = self.num_visits
        return Seen(length, last_visit)
