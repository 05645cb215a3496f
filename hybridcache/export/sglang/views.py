"""Adapters that give SGLang's allocators the interface of this project's allocators.

SGLang owns the free lists. Its indices are int64 tensors on the device; ours are int32 arrays on
the host. Evicted rows are collected and freed in one call, because each free copies SGLang's whole
free list.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hybridcache.allocators.pools import PageAllocator, SlotAllocator
from hybridcache.tokens import Indices


class RowView(PageAllocator):
    """KV rows of a ``BaseTokenToKVPoolAllocator``: 0 (padding) to ``size``.

    Call ``give_back`` after any operation that can evict. Collected rows count as free until then.
    """

    def __init__(self, theirs: Any, page_size: int, token_bytes: int) -> None:
        self._theirs = theirs
        self._owed: list[Indices] = []
        self._num_owed = 0
        self.page_size = page_size
        self.capacity = theirs.size + theirs.page_size
        self.unit_bytes = token_bytes
        self.budget = None
        self._is_on_host = torch.device(theirs.device).type == "cpu"

    @property
    def num_unused(self) -> int:
        return int(self._theirs.available_size()) + self._num_owed

    @property
    def num_free(self) -> int:
        """Number of rows available without evicting, including collected ones. O(1)."""
        return self.num_unused

    @property
    def num_taken(self) -> int:  # type: ignore[override]
        """Number of cached or held rows. O(1)."""
        return int(self._theirs.size) - self.num_unused

    def allocate(self, num_tokens: int) -> Indices | None:
        """Allocate whole pages for ``num_tokens`` tokens. None if too few are free. O(n)."""
        self.give_back()
        rows = self._theirs.alloc(-(-num_tokens // self.page_size) * self.page_size)
        return None if rows is None else to_host(rows)

    def free(self, rows: Indices) -> None:
        """Free rows held by a request, as whole pages. O(n)."""
        self.release(rows)

    def release(self, rows: Indices) -> None:
        """Collect rows released by the cache, for the next ``give_back``. O(1)."""
        if len(rows):
            self._owed.append(rows)
            self._num_owed += len(rows)

    def give_back(self) -> None:
        """Free all collected rows in one call to SGLang. O(collected rows)."""
        if self._owed:
            rows = self._owed[0] if len(self._owed) == 1 else np.concatenate(self._owed)
            self._owed.clear()
            self._num_owed = 0
            self._theirs.free(self.to_device(rows))

    def to_device(self, rows: Indices) -> torch.Tensor:
        """Convert ``rows`` to SGLang's form: int64[n] on its device. O(n)."""
        there = torch.from_numpy(rows.astype(np.int64))
        return there if self._is_on_host else there.to(self._theirs.device, non_blocking=True)

    def free_rows(self) -> Indices:
        """Return all free or collected rows, unordered. O(capacity)."""
        page_size = self._theirs.page_size
        pages = to_host(self._theirs.get_all_free_pages())
        rows = pages[:, None] * page_size + np.arange(page_size, dtype=np.int32)
        return np.concatenate((rows.reshape(-1), *self._owed)).astype(np.int32)

    def check(self) -> None:
        """Raise AssertionError if a row is free twice or out of range. O(capacity)."""
        rows = self.free_rows()
        assert len(np.unique(rows)) == len(rows), "a KV row is free twice"
        assert not len(rows) or (rows.min() > 0 and rows.max() < self.capacity), (
            "a free KV row is out of range"
        )


class SlotView(SlotAllocator):
    """State slots 1 to ``size`` of a ``MambaSlotAllocator``. Slot 0 is padding."""

    def __init__(self, theirs: Any, state_bytes: int) -> None:
        self._theirs = theirs
        self.capacity = theirs.size + 1
        self.unit_bytes = state_bytes
        self.budget = None
        self.is_taken = bytearray([1]) * self.capacity  # SGLang has the list of its free slots
        self._tensors = torch.arange(self.capacity, dtype=torch.int64, device=theirs.device)

    @property
    def num_unused(self) -> int:
        return int(self._theirs.available_size())

    @property
    def num_free(self) -> int:
        """Number of slots available without evicting. O(1)."""
        return self.num_unused

    @property
    def num_taken(self) -> int:  # type: ignore[override]
        """Number of cached or held slots. O(1)."""
        return int(self._theirs.size) - self.num_unused

    def allocate(self) -> int | None:
        """Allocate a slot. None if no slot is free."""
        slot = self._theirs.alloc(1)
        return None if slot is None else int(slot)

    def free(self, slot: int) -> None:
        """Free ``slot`` in SGLang. O(its free list)."""
        self._theirs.free(self.tensor(slot))

    def tensor(self, slot: int) -> torch.Tensor:
        """Return ``slot`` in SGLang's form, int64[1] on its device: a read-only view. O(1)."""
        return self._tensors[slot : slot + 1]

    def free_slots(self) -> list[int]:
        """Return all free slots, unordered. O(capacity)."""
        slots: list[int] = self._theirs.free_slots.tolist()
        return slots

    def check(self) -> None:
        """Raise AssertionError if a slot is free twice or out of range. O(capacity)."""
        slots = self.free_slots()
        assert len(set(slots)) == len(slots), "a slot is free twice"
        assert all(0 < slot < self.capacity for slot in slots), "a free slot is out of range"


def to_host(indices: torch.Tensor) -> Indices:
    """Copy a tensor of indices to the host as int32[n]. O(n); a GPU stream is synchronised."""
    rows: Indices = indices.cpu().numpy().astype(np.int32)
    return rows
