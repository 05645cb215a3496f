"""Compaction of buffers that are mostly dead, because a view keeps its whole buffer alive.

A buffer (bytes of an edge, rows of a segment) is created by one insertion. The nodes that share it
after splits form a chain from top to bottom and are removed from the bottom up. So the living part
is always a prefix of the buffer. When a node is removed and less than half of the buffer is alive,
that prefix is copied and the buffer is released: amortised O(1) per token.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hybridcache.radix.tree import RadixNode
from hybridcache.tokens import Indices


def compact_rows(node: RadixNode, gone: Indices) -> Indices | None:
    """Compact the buffer of ``gone``, the rows of a child of ``node`` that was just removed.

    Returns the living rows of that buffer, possibly in a new one, or None if there are none. O(1),
    or O(living rows).
    """
    base = gone.base
    if node.kv is None or node.kv.indices.base is not base or not isinstance(base, np.ndarray):
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
    """Compact the buffer of ``gone``, the edge of a child of ``node`` that was just removed.

    O(1), or O(living tokens).
    """
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
