"""What requests publish is kept on disk: each new thing in the tree becomes an order for the next
batch."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import numpy as np

from engine.schedule.batch import KEPT
from hybridcache.allocators.moves import DEVICE, Copy, StepQueue
from hybridcache.api import Listener
from hybridcache.policies.protocol import Item
from hybridcache.radix.tree import RadixNode
from hybridcache.tokens import Indices, Tokens

NO_ROWS: Indices = np.empty(0, np.int32)


class Keeping(Listener):
    """Listens to a cache while something is published into it, and at no other time: what is
    fetched was kept before, and its bytes are not there yet."""

    def __init__(self, steps: StepQueue) -> None:
        self._steps = steps
        self._is_publishing = False

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """What becomes resident in here was computed, and is to be kept."""
        self._is_publishing = True
        try:
            yield
        finally:
            self._is_publishing = False

    def kv_stored(self, node: RadixNode) -> None:
        if self._is_publishing and node.kv is not None:
            rows = node.kv.indices.copy()
            self._steps.add(Copy("kv", DEVICE, rows, KEPT, NO_ROWS, node.end, _path(node)))

    def checkpoint_stored(self, node: RadixNode) -> None:
        if self._is_publishing and node.checkpoint is not None:
            slot = np.array([node.checkpoint.slot], np.int32)
            path = _path(node)
            self._steps.add(Copy("checkpoint", DEVICE, slot, KEPT, NO_ROWS, node.end, path))

    def kv_split(self, upper: RadixNode, lower: RadixNode) -> None:
        pass

    def kv_removed(self, node: RadixNode) -> None:
        pass

    def checkpoint_removed(self, node: RadixNode) -> None:
        pass

    def chosen(self, item: Item) -> None:
        pass


def _path(node: RadixNode) -> tuple[Hashable, Tokens]:
    """(namespace, tokens from the first to the end of ``node``). O(position)."""
    parts: list[Tokens] = []
    while node.parent is not None:
        parts.append(node.tokens)
        node = node.parent
    return node.key, np.concatenate(parts[::-1])
