"""Ghosts: nodes of which only the tokens are left, bounded in bytes, oldest forgotten first.

Order is the order in which their KV went. KV goes from the leaves up, so a ghost's children always
stand before it and the oldest ghost never has children: forgetting is O(1) and needs no search. A
ghost that comes again is revived.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from hybridcache.radix.compact import compact_edges
from hybridcache.radix.tree import TOKEN_BYTES, Checkpoint, RadixNode, RadixTree
from hybridcache.tokens import Tokens

GHOST_NODE_BYTES = 640
"""Host bytes a ghost node takes beside its tokens (measured: node, two views, dict entries)."""


def read_ghosts(
    tree: RadixTree, node: RadixNode, tokens: Tokens
) -> tuple[int, Checkpoint | None, bool]:
    """(how deep ``tokens``, whose resident part ends with ``node``, were ever seen, the deepest
    evicted checkpoint down there that could be resumed from, whether other tokens were seen to
    follow). O(len(tokens))."""
    ghost, inside, length = tree.walk(node, tokens[node.end :], ghosts=True)
    forks = inside is not None or bool(ghost.children) or bool(ghost.ghosts)
    while ghost is not node:
        if ghost.lost_checkpoint is not None and ghost.end < len(tokens):
            return length, ghost.lost_checkpoint, forks
        assert ghost.parent is not None
        ghost = ghost.parent
    return length, None, forks


class GhostList:
    """The ghosts of one tree. Every operation O(1); ``trim`` O(1) a ghost forgotten."""

    def __init__(self, tree: RadixTree, limit_bytes: int) -> None:
        self.tree = tree
        self.node_bytes = GHOST_NODE_BYTES
        self.limit_bytes = limit_bytes
        self.num_bytes = 0
        self._order: OrderedDict[RadixNode, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._order)

    def oldest_first(self) -> Iterator[RadixNode]:
        """All ghosts, the next to be forgotten first."""
        return iter(self._order)

    @property
    def num_tokens(self) -> int:
        return (self.num_bytes - GHOST_NODE_BYTES * len(self._order)) // TOKEN_BYTES

    def add(self, ghost: RadixNode) -> None:
        """``ghost`` has just lost its KV."""
        assert ghost.parent is not None
        self._order[ghost] = None
        # The edge's length without looking at the edge: it has been cold for as long as the node
        # was old.
        self.num_bytes += (ghost.end - ghost.parent.end) * TOKEN_BYTES + GHOST_NODE_BYTES

    def discard(self, ghost: RadixNode) -> None:
        """``ghost`` is resident again."""
        del self._order[ghost]
        self.num_bytes -= len(ghost.edge) + GHOST_NODE_BYTES

    def shrink(self, num_bytes: int) -> None:
        """A ghost lost the first ``num_bytes`` of its edge to a node that was split off above it
        and revived."""
        self.num_bytes -= num_bytes

    def trim(self) -> None:
        """Forget the oldest until the rest fits."""
        while self.num_bytes > self.limit_bytes:
            ghost, _ = self._order.popitem(last=False)
            self.num_bytes -= len(ghost.edge) + GHOST_NODE_BYTES
            self.tree.forget(ghost)
            if ghost.parent is not None:
                compact_edges(ghost.parent, ghost.edge)
            ghost.edge = b""  # a policy's queue may hold the node for a while yet
            parent = ghost.parent
            if parent is not None and parent.parent is None:
                self.tree.prune_root(parent.key)

    def clear(self) -> None:
        limit, self.limit_bytes = self.limit_bytes, 0
        self.trim()
        self.limit_bytes = limit
