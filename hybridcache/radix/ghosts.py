"""Ghosts: nodes of which only the tokens remain, bounded in bytes, the oldest removed first.

They are ordered by the eviction of their KV. KV is evicted from the leaves up, so the children of a
ghost precede it, and the oldest ghost never has children. Removing it is O(1) and needs no search.
A ghost is revived if its tokens are published again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from hybridcache.radix.tree import TOKEN_BYTES, Checkpoint, RadixNode, RadixTree
from hybridcache.tokens import EMPTY, Indices, Tokens

GHOST_NODE_BYTES = 640
"""Host bytes of a ghost node in addition to its tokens (measured: node, bytes, dict entries)."""


def read_ghosts(
    tree: RadixTree, node: RadixNode, tokens: Tokens
) -> tuple[int, Checkpoint | None, bool]:
    """Follow ``tokens`` through the ghosts below ``node``, the end of their resident part. O(n).

    ``node`` must have ghosts.

    Returns the length of the tokens seen before, the deepest evicted checkpoint on the way that
    could be resumed from (or None), and whether other tokens were seen to follow.
    """
    ghost, inside, length = tree.walk(node, tokens[node.end :], ghosts=True)
    forks = inside is not None or bool(ghost.ghosts)
    while ghost is not node:
        if ghost.lost_checkpoint is not None and ghost.end < len(tokens):
            return length, ghost.lost_checkpoint, forks
        assert ghost.parent is not None
        ghost = ghost.parent
    return length, None, forks


class GhostList:
    """Ghosts of one tree. Every operation is O(1); ``trim`` is O(1) per removed ghost."""

    def __init__(self, tree: RadixTree, limit_bytes: int) -> None:
        self.tree = tree
        self.limit_bytes = limit_bytes
        self.num_bytes = 0
        self._order: OrderedDict[RadixNode, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._order)

    def oldest_first(self) -> Iterator[RadixNode]:
        """Iterate over all ghosts, the next to be removed first."""
        return iter(self._order)

    def add(self, ghost: RadixNode, rows: Indices = EMPTY) -> None:
        """Add ``ghost``, which has just lost its KV. ``rows`` held it, and are free by now."""
        assert ghost.parent is not None
        self._order[ghost] = None
        # The edge's length without looking at the edge: it has been cold for as long as the node
        # was old.
        self.num_bytes += (ghost.end - ghost.parent.end) * TOKEN_BYTES + GHOST_NODE_BYTES

    def discard(self, ghost: RadixNode) -> None:
        """Remove ``ghost``, which is resident again."""
        del self._order[ghost]
        self.num_bytes -= len(ghost.edge) + GHOST_NODE_BYTES

    def split(self, upper: RadixNode, lower: RadixNode) -> None:
        """Remove ``upper``, the new upper part of the ghost ``lower``: it becomes resident."""
        self.num_bytes -= len(upper.edge)

    def trim(self) -> None:
        """Remove the oldest ghosts until the others fit in ``limit_bytes``."""
        while self.num_bytes > self.limit_bytes:
            ghost, _ = self._order.popitem(last=False)
            self.num_bytes -= len(ghost.edge) + GHOST_NODE_BYTES
            self.tree.forget(ghost)
            ghost.edge = b""  # a policy's queue may hold the node for a while yet

    def clear(self) -> None:
        limit, self.limit_bytes = self.limit_bytes, 0
        self.trim()
        self.limit_bytes = limit
