"""The same events in blocks of a fixed size, named by chained hashes, as routers of other engines
expect them.

A block is the tokens up to one multiple of ``block_size``; its hash covers all tokens before it, so
equal hashes mean equal prefixes on every replica. A block counts as stored while the KV of its last
token is. A checkpoint is named by its position and the hash of all tokens up to it.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import numpy as np

from hybridcache.export.events import (
    CheckpointRemoved,
    CheckpointStored,
    Event,
    KVRemoved,
    KVSplit,
    KVStored,
)
from hybridcache.export.namespaces import Namespace


class _Segment:
    """One segment's tokens, with the hash state before its first token and the block that token
    falls in."""

    __slots__ = ("blocks", "parent", "pending", "root", "start", "tokens")

    def __init__(
        self, start: int, tokens: tuple[int, ...], parent: int | None, root: int, pending: Any
    ) -> None:
        self.start = start
        self.tokens = tokens
        self.parent = parent
        self.root = root
        """Hash of the last whole block before ``start``."""
        self.pending: tuple[int, ...] = pending
        """Tokens between that block and ``start``."""
        self.blocks: list[int] = []
        """Hashes of the blocks that end in it."""


class BlockEvents:
    """A sink for ``EventStream`` that writes to ``sink`` dicts of the form

    ``{"type": "BlockStored", "block_hashes", "parent_block_hash", "token_ids", "block_size"}``,
    ``{"type": "BlockRemoved", "block_hashes"}``, and for states
    ``{"type": "CheckpointStored" | "CheckpointRemoved", "position", "prefix_hash"}``.
    """

    def __init__(self, block_size: int, sink: Callable[[dict[str, Any]], None]) -> None:
        """``block_size`` in tokens. ValueError: it is not positive."""
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1 token, got {block_size}")
        self.block_size = block_size
        self._sink = sink
        self._segments: dict[int, _Segment] = {}
        self._holders: dict[int, int] = {}
        """Segments with a block: several where pages are longer than blocks and prompts part inside
        a page."""

    def __call__(self, event: Event) -> None:
        """Follow one event. O(tokens of the segment)."""
        match event:
            case KVStored():
                self._store(event)
            case KVSplit():
                self._split(event)
            case KVRemoved():
                self._remove(self._segments.pop(event.id))
            case CheckpointStored() | CheckpointRemoved():
                last, pending = self._tail(self._segments[event.id])
                self._sink(
                    {
                        "type": type(event).__name__,
                        "position": event.position,
                        "prefix_hash": chain_hash(last, pending) if pending else last,
                    }
                )

    def _store(self, event: KVStored) -> None:
        if event.parent is None:
            last = namespace_hash(event.namespace)
            pending: tuple[int, ...] = ()
        else:
            last, pending = self._tail(self._segments[event.parent])
        segment = _Segment(event.start, event.tokens, event.parent, last, pending)
        self._segments[event.id] = segment
        waiting = pending + event.tokens
        whole = len(waiting) - len(waiting) % self.block_size
        for first in range(0, whole, self.block_size):
            last = chain_hash(last, waiting[first : first + self.block_size])
            segment.blocks.append(last)
        new = [block for block in segment.blocks if block not in self._holders]
        for block in segment.blocks:
            self._holders[block] = self._holders.get(block, 0) + 1
        if new:
            num_known = len(segment.blocks) - len(new)
            self._sink(
                {
                    "type": "BlockStored",
                    "block_hashes": new,
                    "parent_block_hash": segment.blocks[num_known - 1]
                    if num_known
                    else segment.root,
                    "token_ids": list(waiting[num_known * self.block_size : whole]),
                    "block_size": self.block_size,
                }
            )

    def _remove(self, segment: _Segment) -> None:
        """What no other segment has goes."""
        gone = []
        for block in segment.blocks:
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]
                gone.append(block)
        if gone:
            self._sink({"type": "BlockRemoved", "block_hashes": gone})

    def _tail(self, segment: _Segment) -> tuple[int, tuple[int, ...]]:
        """(hash of the last whole block up to its end, tokens after that block)."""
        end = segment.start + len(segment.tokens)
        num_pending = end % self.block_size
        waiting = segment.pending + segment.tokens
        last = segment.blocks[-1] if segment.blocks else segment.root
        return last, waiting[len(waiting) - num_pending :]

    def _split(self, event: KVSplit) -> None:
        lower = self._segments[event.id]
        cut = event.position - lower.start
        upper = _Segment(lower.start, lower.tokens[:cut], lower.parent, lower.root, lower.pending)
        num_blocks = event.position // self.block_size - lower.start // self.block_size
        upper.blocks, lower.blocks = lower.blocks[:num_blocks], lower.blocks[num_blocks:]
        self._segments[event.upper] = upper
        lower.root, lower.pending = self._tail(upper)
        lower.start, lower.tokens, lower.parent = event.position, lower.tokens[cut:], event.upper


def chain_hash(parent: int, tokens: tuple[int, ...]) -> int:
    """64-bit hash of ``tokens`` after everything that ``parent`` covers. O(tokens)."""
    data = parent.to_bytes(8, "little") + np.array(tokens, "<i4").tobytes()
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def namespace_hash(namespace: Namespace) -> int:
    """What the chains of a namespace begin with; 0 for the unnamed one."""
    if namespace is None:
        return 0
    digest = blake2b(repr(namespace).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
