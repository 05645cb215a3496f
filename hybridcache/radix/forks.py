"""Which checkpoints are superseded: those with a deeper one on the same unforked path (one resident child at each step).

Each change of the tree can flip at most one checkpoint's answer, the nearest at or above the place, because that one
supersedes whatever stands above it on the path. All walks are along unforked paths: O(nodes of the path).
"""

from __future__ import annotations

from hybridcache.radix.family import only_child
from hybridcache.radix.node import Checkpoint, RadixNode


def unforked_above(node: RadixNode) -> Checkpoint | None:
    """The nearest checkpoint strictly above ``node``, if no path forks off between it and ``node``."""
    above = node.parent
    while above is not None and not isinstance(above.children, dict):
        if above.checkpoint is not None:
            return above.checkpoint
        above = above.parent
    return None


def unforked_at(node: RadixNode) -> Checkpoint | None:
    """As ``unforked_above``, with ``node``'s own checkpoint counted."""
    return node.checkpoint if node.checkpoint is not None else unforked_above(node)


def has_deeper(node: RadixNode) -> bool:
    """Whether a checkpoint stands strictly below ``node`` before the path forks or ends."""
    child = only_child(node.children)
    while child is not None:
        if child.checkpoint is not None:
            return True
        child = only_child(child.children)
    return False
