"""The infinite cache, and the compressed radix tree that it shares with the plan with hindsight and
the rebuilt caches of SGLang and Marconi. They share no code with the cache that they measure."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from hybridcache.lab.traces.trace import TraceRequest
from hybridcache.radix.tokens import Tokens, common_prefix_len


@dataclass(slots=True, eq=False)
class PrefixNode:
    """One edge and its end. ``time`` is the owner's recency mark."""

    tokens: Tokens
    parent: PrefixNode | None
    depth: int = field(init=False)
    children: dict[int, PrefixNode] = field(default_factory=dict)
    has_state: bool = False
    time: int = 0
    locks: int = 0
    state_locks: int = 0

    def __post_init__(self) -> None:
        self.depth = len(self.tokens) + (self.parent.depth if self.parent else 0)

    def path(self) -> Iterator[PrefixNode]:
        """Yield the nodes from this one up, without the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


def new_root() -> PrefixNode:
    """Return an empty tree."""
    return PrefixNode(np.empty(0, np.int32), None)


def walk(root: PrefixNode, tokens: Tokens) -> tuple[PrefixNode, int]:
    """Return the last node reached and the number of matched tokens, which is less than its depth
    if the match ends inside its edge. O(n)."""
    node, matched = root, 0
    while matched < len(tokens):
        child = node.children.get(int(tokens[matched]))
        if child is None:
            break
        node = child
        common = common_prefix_len(child.tokens, tokens[matched:])
        matched += common
        if common < len(child.tokens):
            break
    return node, matched


def split(node: PrefixNode, depth: int) -> PrefixNode:
    """Split ``node``'s edge at ``depth``; returns the new upper node, with the KV locks but no
    state."""
    parent = node.parent
    assert parent is not None and parent.depth < depth < node.depth
    at = depth - parent.depth
    upper = PrefixNode(node.tokens[:at], parent)
    upper.time, upper.locks = node.time, node.locks
    parent.children[int(upper.tokens[0])] = upper
    node.tokens, node.parent = node.tokens[at:], upper
    upper.children[int(node.tokens[0])] = node
    return upper


def grow(
    node: PrefixNode, matched: int, tokens: Tokens
) -> tuple[PrefixNode, int, PrefixNode | None]:
    """Make ``tokens`` end at a node; ``node`` and ``matched`` are their ``walk``. Returns the end,
    the number of new tokens, and the node made by a split where they leave the tree, if any."""
    fork = None
    if matched < node.depth:
        node = fork = split(node, matched)
    new = len(tokens) - matched
    if new:
        child = PrefixNode(tokens[matched:].copy(), node)  # A view would keep the whole prompt.
        node.children[int(child.tokens[0])] = child
        node = child
    return node, new, fork


def remove_leaf(node: PrefixNode) -> PrefixNode:
    """Remove a leaf from the tree; returns its parent."""
    parent = node.parent
    assert parent is not None and not node.children
    del parent.children[int(node.tokens[0])]
    return parent


def merge_into_child(node: PrefixNode) -> PrefixNode:
    """Join an inner node's edge to its only child, which is returned."""
    (child,) = node.children.values()
    parent = node.parent
    assert parent is not None
    child.tokens, child.parent = np.concatenate([node.tokens, child.tokens]), parent
    parent.children[int(child.tokens[0])] = child
    return child


def nodes(root: PrefixNode) -> Iterator[PrefixNode]:
    """Yield every node below ``root``, parents first, children in the order of insertion."""
    stack = list(reversed(root.children.values()))
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(node.children.values()))


# --- Infinite cache -------------------------------------------------------------------------------


class Seen(NamedTuple):
    """Known part of one sequence."""

    length: int
    """Leading ids that some earlier sequence began with too."""
    last_visit: int | None
    """Number of the visit that came to that depth last; None where nothing was seen."""


class InfiniteCache:
    """Cache of every token ever seen: a bound for every policy, and a measure for traces.

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
        """Return the known part of the prompt, and store prompt and answer. O(len)."""
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
