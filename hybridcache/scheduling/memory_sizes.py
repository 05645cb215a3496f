"""Sizes of the memory of a cache or a runner in rows and slots, without its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hybridcache.allocators.arena import slab_rows

SLOTS_OF_ONE = 3
"""States of one request that cannot be evicted: its own, the checkpoint that it resumed from, and
the rolling checkpoint of its decoding."""


@dataclass(frozen=True, slots=True)
class MemorySizes:
    """Number and size of the KV rows and state slots in one memory."""

    memory: Literal["arena", "pools"]
    """``arena``: rows and slots share their bytes; ``pools``: each has its own."""
    num_kv_tokens: int
    """KV rows of the pool or of the whole arena, in whole pages."""
    num_slots: int
    """State slots of the pool, or slabs of the arena; 0 if the model is attention-only."""
    row_bytes: int
    """Bytes of one token's keys and values."""
    state_bytes: int
    """Bytes of one state; 0 if the model is attention-only."""
    page_size: int = 1
    owns_states: bool = False
    """True if running states are stored outside this memory, one per row of the request table. The
    slots then hold checkpoints only."""

    @property
    def is_stateful(self) -> bool:
        return self.state_bytes > 0

    @property
    def slab_rows(self) -> int:
        """KV rows that occupy as many bytes as one slot; 0 if states have a separate pool or do not
        exist."""
        if self.memory == "pools" or not self.is_stateful:
            return 0
        return slab_rows(self.state_bytes, self.row_bytes, self.page_size)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot: ``state_bytes``, or a slab."""
        return self.slab_rows * self.row_bytes or self.state_bytes

    @property
    def total_bytes(self) -> int:
        num_bytes = self.num_kv_tokens * self.row_bytes
        return num_bytes + (0 if self.slab_rows else self.num_slots * self.state_bytes)

    def share(self, num_tokens: int, num_states: int) -> float:
        """Return the part of the memory, 0 to 1, that ``num_tokens`` KV rows and ``num_states``
        states take. With two pools, the fuller pool counts."""
        if self.memory == "arena" or not self.is_stateful:
            return (num_tokens + num_states * self.slab_rows) / max(1, self.num_kv_tokens)
        rows, slots = max(1, self.num_kv_tokens), max(1, self.num_slots)
        return max(num_tokens / rows, num_states / slots)

    @property
    def max_request_len(self) -> int:
        """Longest request, in tokens, that can always be served to its end, if need be alone."""
        if self.is_stateful and not self.num_slots:
            return 0
        whole = self.num_kv_tokens // self.page_size * self.page_size
        return max(0, whole - SLOTS_OF_ONE * self.slab_rows)
