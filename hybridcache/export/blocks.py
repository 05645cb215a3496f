"""KV events in blocks of a fixed size with chained hashes, the format of other engines' routers.

A block ends at a multiple of ``block_size``. Its hash covers all tokens before its end, so equal
hashes mean equal prefixes on every replica. A block counts as stored while the KV of its last token
is resident. A checkpoint is identified by its position and the hash of all tokens up to it.
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
    """Tokens of one segment, with the hash state at its start."""

    __slots__ = ("blocks", "parent", "pending", "root", "start", "tokens")

    def __init__(
        self, start: int, tokens: tuple[int, ...], parent: int | None, root: int, pending: Any
    ) -> None:
        self.start = start
        self.tokens = tokens
        self.parent = parent
        self.root = root
        """Hash of the last complete block before ``start``."""
        self.pending: tuple[int, ...] = pending
        """Tokens between that block and ``start``."""
        self.blocks: list[int] = []
        """Hashes of the blocks that end in the segment."""


class BlockEvents:
    """Sink for ``EventStream`` that passes block events to ``sink`` as dicts.

    - ``{"type": "BlockStored", "block_hashes", "parent_block_hash", "token_ids", "block_size"}``
    - ``{"type": "BlockRemoved", "block_hashes"}``
    - ``{"type": "CheckpointStored" | "CheckpointRemoved", "position", "prefix_hash"}``
    """

    def __init__(self, block_size: int, sink: Callable[[dict[str, Any]], None]) -> None:
        """Create a sink for blocks of ``block_size`` tokens. Raises ValueError if it is below 1."""
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1 (got {block_size}).")
        self.block_size = block_size
        self._sink = sink
        self._segments: dict[int, _Segment] = {}
        self._holders: dict[int, int] = {}
        """Number of segments per block. It exceeds 1 if pages are longer than blocks and prompts
        diverge inside a page."""

    def __call__(self, event: Event) -> None:
        """Convert one event. O(tokens of the segment)."""
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
        """Report the blocks that no other segment contains."""
        gone = []
        for block in segment.blocks:
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]
                gone.append(block)
        if gone:
            self._sink({"type": "BlockRemoved", "block_hashes": gone})

    def _tail(self, segment: _Segment) -> tuple[int, tuple[int, ...]]:
        """Return (hash of the last complete block, tokens after that block)."""
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
    """Hash ``tokens`` after the tokens covered by ``parent``: 64 bits. O(tokens)."""
    data = parent.to_bytes(8, "little") + np.array(tokens, "<i4").tobytes()
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def namespace_hash(namespace: Namespace) -> int:
    """Return the initial hash of a namespace's chains; 0 for the unnamed namespace."""
    if namespace is None:
        return 0
    digest = blake2b(repr(namespace).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
