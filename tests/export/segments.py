"""Segments of a cache as its mirror must have them, read from the tree."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hybridcache.export.events import EventStream, KVStored
from hybridcache.radix.tree import RadixNode


def segments_of(nodes: Iterable[RadixNode]) -> set[tuple[Any, ...]]:
    """Return the expected ``Mirror.segments`` of resident ``nodes``, parents first. O(tokens)."""
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
