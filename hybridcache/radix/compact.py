"""Views keep their whole buffer alive: when most of a split buffer is dead, the living part moves
to one of its own.

A buffer (an edge's bytes, a segment's rows) is born with one insert, so the nodes that share it
after splits are a chain from top to bottom, and they go from the bottom up: what lives is always a
prefix of the buffer. When a node goes and less than half of the buffer is left, that prefix is
copied once and the buffer is let go: amortised O(1) a token.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hybridcache.radix.tree import RadixNode
from hybridcache.tokens import Indices


def compact_rows(node: RadixNode, gone: Indices) -> Indices | None:
    """``gone`` were the rows of a child of ``node`` that has just left. What is left of their
    buffer, perhaps in a new one; None: nothing. O(1), or O(rows that live)."""
    base = gone.base
    if not isinstance(base, np.ndarray) or node.kv is None:
        return None
    if node.kv.indices.base is not base:
        return None
    num_living = (_address(gone) - _address(base)) // gone.itemsize
    if 2 * num_living >= len(base):
        return base[:num_living]
    living = base[:num_living].copy()
    above: RadixNode | None = node
    while above is not None and above.kv is not None and above.kv.indices.base is base:
        length = len(above.kv.indices)
        above.kv.indices = living[num_living - length : num_living]
        num_living -= length
        above = above.parent
    return living


def compact_edges(node: RadixNode, gone: bytes | memoryview) -> None:
    """``gone`` was the edge of a child of ``node`` that has just left. O(1), or O(tokens that
    live)."""
    if not isinstance(gone, memoryview) or not isinstance(node.edge, memoryview):
        return
    whole = gone.obj
    if node.edge.obj is not whole or not isinstance(whole, bytes):
        return
    num_living = _address(np.frombuffer(gone, np.uint8)) - _address(np.frombuffer(whole, np.uint8))
    if 2 * num_living >= len(whole):
        return
    living = memoryview(whole[:num_living])
    above: RadixNode | None = node
    while above is not None and isinstance(above.edge, memoryview) and above.edge.obj is whole:
        length = len(above.edge)
        above.edge = living[num_living - length : num_living]
        num_living -= length
        above = above.parent


def _address(array: npt.NDArray[np.int32] | npt.NDArray[np.uint8]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
