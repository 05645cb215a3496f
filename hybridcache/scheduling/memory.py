"""How much memory a runner has, in rows and slots. The tensors are
``engine.run.memory``'s."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hybridcache.allocators.arena import slab_rows

SLOTS_OF_ONE = 3
"""States that one request may keep from eviction: its own, the checkpoint that it stands on, and
the one that rolls while it decodes."""


@dataclass(frozen=True, slots=True)
class MemorySizes:
    """How many KV rows and state slots a runner's memory holds, and what each weighs."""

    memory: Literal["arena", "pools"]
    """``arena``: rows and slots are the same bytes; ``pools``: each has its own."""
    num_kv_tokens: int
    """KV rows, whole pages: of the pool, or all of the arena."""
    num_slots: int
    """State slots: of the pool, or the slabs of the arena. 0: an attention-only model."""
    row_bytes: int
    """Of one token's keys and values in all full-attention layers."""
    state_bytes: int
    """Of one state; 0: an attention-only model."""
    page_size: int = 1
    owns_states: bool = False
    """Running states lie beside this memory, one a row of the request table, and the slots hold
    checkpoints alone."""

    @property
    def is_stateful(self) -> bool:
        return self.state_bytes > 0

    @property
    def slab_rows(self) -> int:
        """KV rows whose bytes one slot takes; 0: states have a pool of their own, or there are
        none."""
        if self.memory == "pools" or not self.is_stateful:
            return 0
        return slab_rows(self.state_bytes, self.row_bytes, self.page_size)

    @property
    def slot_bytes(self) -> int:
        """That one slot takes: ``state_bytes``, or a slab."""
        return self.slab_rows * self.row_bytes or self.state_bytes

    @property
    def total_bytes(self) -> int:
        num_bytes = self.num_kv_tokens * self.row_bytes
        return num_bytes + (0 if self.slab_rows else self.num_slots * self.state_bytes)

    def share(self, num_tokens: int, num_states: int) -> float:
        """Part of the memory, 0 to 1, that so many KV rows and states take: of the scarcer pool."""
        if self.memory == "arena" or not self.is_stateful:
            return (num_tokens + num_states * self.slab_rows) / max(1, self.num_kv_tokens)
        rows, slots = max(1, self.num_kv_tokens), max(1, self.num_slots)
        return max(num_tokens / rows, num_states / slots)

    @property
    def max_request_len(self) -> int:
        """Tokens that one request may have KV for and always be served to its end, alone if need
        be."""
        return self.num_kv_tokens - SLOTS_OF_ONE * self.slab_rows
