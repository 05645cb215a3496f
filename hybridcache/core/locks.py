"""How much KV stands under locks, and how many checkpoints: the paths of all locked nodes, a shared
part counted once.

It is asked for only where locks may stand in the way of an allocation, far less often than they
change. So a lock leaves no work behind, a lock that is gone again before anybody asked does not
either, and asking follows each change upward to the first node that another lock pins: amortised
O(1) a node that a request brought or resumed from.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from hybridcache.radix.node import RadixNode, members

NEW, COUNTED, WITH_CHECKPOINT = range(3)
"""How a locked node stands in the counts: not yet (false), its path, its path and its
checkpoint."""


class Protected(NamedTuple):
    """What no eviction can free now."""

    num_tokens: int
    num_checkpoints: int


class LockedPaths:
    """Counts what is under locks.

    ``RadixNode.pins``: 1 if its own lock was counted, and 1 for each child that is pinned. Who has
    pins counts once.
    """

    __slots__ = ("_num_checkpoints", "_num_tokens", "nodes", "released")

    def __init__(self) -> None:
        self.nodes: dict[RadixNode, int] = {}
        """The locked ones, the latest last, and how each was counted: none before one that was
        not."""
        self.released: dict[RadixNode, int] = {}
        """Those that are still counted though their lock is gone."""
        self._num_tokens = 0
        self._num_checkpoints = 0

    def protected(self) -> Protected:
        """O(nodes that came under locks, or from under them, since the last call)."""
        nodes, released = self.nodes, self.released
        for node in reversed(nodes):
            if nodes[node] != NEW:
                break
            self._pin(node)
            nodes[node] = COUNTED
            if node.checkpoint is not None:
                self.checkpoint_stored(node)
        if released:
            for node, how in released.items():
                self._unpin(node)
                self._num_checkpoints -= how == WITH_CHECKPOINT
            released.clear()
        return Protected(self._num_tokens, self._num_checkpoints)

    def checkpoint_stored(self, node: RadixNode) -> None:
        """``node``, which is locked, has a checkpoint now. O(1)."""
        if self.nodes[node] == COUNTED:
            self.nodes[node] = WITH_CHECKPOINT
            self._num_checkpoints += 1

    def forget(self, leaf: RadixNode) -> None:
        """``leaf``, pinned but no longer locked, loses its KV."""
        self._num_checkpoints -= self.released.pop(leaf) == WITH_CHECKPOINT
        self._unpin(leaf)

    def _pin(self, node: RadixNode) -> None:
        parent = node.parent
        while parent is not None:
            node.pins += 1
            if node.pins > 1:
                return
            self._num_tokens += node.end - parent.end
            node, parent = parent, parent.parent

    def _unpin(self, node: RadixNode) -> None:
        parent = node.parent
        while parent is not None:
            node.pins -= 1
            if node.pins:
                return
            self._num_tokens -= node.end - parent.end
            node, parent = parent, parent.parent

    def check(self, nodes: Iterable[RadixNode]) -> None:
        """``nodes``: all there are. O(those)."""
        num_tokens = num_checkpoints = 0
        for node in nodes:
            how, before = self.nodes.get(node, NEW), self.released.get(node, NEW)
            own = (how != NEW) + (before != NEW)
            pins = own + sum(child.pins > 0 for child in members(node.children))
            assert node.pins == pins, f"{node} has {node.pins} pins, not {pins}"
            num_tokens += (node.end - node.start) * (pins > 0)
            num_checkpoints += (how == WITH_CHECKPOINT) + (before == WITH_CHECKPOINT)
            if how != NEW:
                assert (how == WITH_CHECKPOINT) == (node.checkpoint is not None), f"{node} {how}"
        new = [how == NEW for how in self.nodes.values()]
        assert new == sorted(new), "a lock was counted before an older one"
        assert num_tokens == self._num_tokens, f"{num_tokens} pinned, counted {self._num_tokens}"
        assert num_checkpoints == self._num_checkpoints, "checkpoints counted under locks"
