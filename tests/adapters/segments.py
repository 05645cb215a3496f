"""Segments of a cache and of its mirror, which must be equal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hybridcache.adapters.events import EventStream, KVStored
from hybridcache.radix.tree import RadixNode


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
