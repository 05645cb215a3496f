"""Segments of a cache and of a plain mirror, which must be equal."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from hybridcache.adapters.events import (
    CheckpointRemoved,
    CheckpointStored,
    Event,
    EventStream,
    KVRemoved,
    KVSplit,
    KVStored,
    MirrorMatch,
)
from hybridcache.radix.tokens import EMPTY, Tokens
from hybridcache.radix.tree import Checkpoint, Edge, ItemBytes, RadixNode, RadixTree


def segments_of(nodes: Iterable[RadixNode]) -> set[tuple[Any, ...]]:
    """Return the resident segments of ``nodes`` of a cache or its mirror. O(tokens)."""
    found: list[Any] = []
    stream = EventStream(found.append)
    segments = set()
    for node in nodes:
        if node.kv is not None:
            stream.kv_stored(node)
            stored = found.pop()
            assert isinstance(stored, KVStored)
            segments.add((*stored, node.checkpoint is not None))
    return segments


class PlainMirror:
    """``Mirror`` with the token ids of one cache in a tree of its own."""

    def __init__(self, unit: int, page_size: int = 1, stateful: bool = True) -> None:
        self.unit, self.stateful = unit, stateful
        self.tree = RadixTree(page_size)
        self.nodes: dict[int, RadixNode] = {}

    def apply(self, event: Event) -> None:
        tree, nodes = self.tree, self.nodes
        match event:
            case KVStored(id_, above, namespace, first, tokens):
                parent = tree.root(namespace) if above is None else nodes[above]
                self._add(id_, tree.grow(parent, tokens[4 * (parent.end - first) :]))
            case KVSplit(id_, upper_id, position):
                self._add(upper_id, tree.split(nodes[id_], position))
            case KVRemoved(id_):
                node = nodes.pop(id_)
                tree.fade(node)
                tree.forget(node)
            case CheckpointStored(id_):
                nodes[id_].checkpoint = Checkpoint(nodes[id_], 0, 0, 0, ItemBytes(0, 0))
            case CheckpointRemoved(id_):
                nodes[id_].checkpoint = None

    def _add(self, id_: int, node: RadixNode) -> None:
        node.kv = Edge(node, EMPTY, 0, id_, ItemBytes(0, 0))
        self.nodes[id_] = node

    def match(self, tokens: Tokens, namespace: Hashable = None) -> MirrorMatch:
        above, _, end = self.tree.walk(self.tree.root(namespace), tokens.tobytes(), 0)
        held, most = end - end % self.unit, max(len(tokens) - 1, 0)
        if not self.stateful:
            return MirrorMatch(min(held, most - most % self.unit), held)
        while above.parent is not None and (above.checkpoint is None or above.end > most):
            above = above.parent
        return MirrorMatch(above.end, held)
