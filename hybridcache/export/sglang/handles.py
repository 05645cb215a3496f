"""References that SGLang keeps between two calls: node handles, lock receipts, a node order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang.srt.mem_cache.base_prefix_cache import DecLockRefParams, IncLockRefResult

from hybridcache.api import LockHandle
from hybridcache.radix.tree import NodeHandle, RadixNode
from hybridcache.variants import PathPart


class _Root:
    """Handle of the empty prefix."""

    def __repr__(self) -> str:
        return "<root>"


ROOT = _Root()
"""Handle of an empty match. SGLang uses None for "not matched yet"."""

Node = NodeHandle | None


def handle_of(node: Node) -> Any:
    return ROOT if node is None else node


def node_of(handle: Any) -> Any:
    """Return the node or path part of a handle, or None for the root."""
    return None if handle is ROOT else handle


@dataclass
class Held(IncLockRefResult, DecLockRefParams):
    """Lock receipt with both of SGLang's interfaces."""

    receipt: LockHandle | None = None

    def to_dec_params(self) -> Held:
        return self


def dfs_order(handles: Sequence[Any]) -> list[int]:
    """Sort handles in depth-first order, heaviest branch first. Returns indices.

    Handles under one node stay together. Deeper nodes precede shallower ones, and ties are broken
    by first appearance, so the order is equal on all ranks. O(handles * depth).
    """
    paths = [_path(node_of(handle)) for handle in handles]
    weight = Counter(node for path in paths for node in path)
    rank: dict[RadixNode, int] = {node: number for number, node in enumerate(weight)}

    def place(index: int) -> tuple[tuple[int, int], ...]:
        return (*((-weight[node], rank[node]) for node in paths[index]), (1, 0))

    return sorted(range(len(handles)), key=place)


def _path(node: Node) -> list[RadixNode]:
    last = node.last() if isinstance(node, PathPart) else node
    above = last if isinstance(last, RadixNode) else None
    path = []
    while above is not None:
        path.append(above)
        above = above.parent
    return path[::-1]
