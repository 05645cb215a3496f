"""What SGLang holds of the tree between two calls: nodes, receipts of locks, and an order of
nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang.srt.mem_cache.base_prefix_cache import DecLockRefParams, IncLockRefResult

from hybridcache.hybrid import Receipt
from hybridcache.radix.tree import RadixNode
from hybridcache.variants import PathPart


class _Root:
    """Where nothing is cached."""

    def __repr__(self) -> str:
        return "<root>"


ROOT = _Root()
"""The handle of a match that found nothing: SGLang takes None for "not matched yet"."""

Node = RadixNode | PathPart | None


def handle_of(node: Node) -> Any:
    return ROOT if node is None else node


def node_of(handle: Any) -> Any:
    """What a handle stands for: a node, a part of a path, or None for the root."""
    return None if handle is ROOT else handle


@dataclass
class Held(IncLockRefResult, DecLockRefParams):
    """A lock's receipt, in the two forms in which SGLang carries it."""

    receipt: Receipt | None = None

    def to_dec_params(self) -> Held:
        return self


def dfs_order(handles: Sequence[Any]) -> list[int]:
    """Indices of ``handles`` so that those under one node stay together, the branch with most of
    them first, deeper before shallower. The same on every rank: ties go by first appearance.
    O(handles * depth)."""
    paths = [_path(node_of(handle)) for handle in handles]
    weight = Counter(node for path in paths for node in path)
    rank: dict[RadixNode, int] = {node: number for number, node in enumerate(weight)}

    def place(index: int) -> tuple[tuple[int, int], ...]:
        return (*((-weight[node], rank[node]) for node in paths[index]), (1, 0))

    return sorted(range(len(handles)), key=place)


def _path(node: Node) -> list[RadixNode]:
    above: RadixNode | None = node.last() if isinstance(node, PathPart) else node
    path = []
    while above is not None:
        path.append(above)
        above = above.parent
    return path[::-1]
