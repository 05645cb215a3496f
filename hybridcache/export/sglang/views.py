"""SGLang's allocators in the seats of ours: it owns the free lists, the tree sees rows and slots.

Its indices are int64 tensors on the device, ours int32 arrays on the host. What the tree evicts is
collected here and given back as one tensor, since each of its frees copies the whole free list.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hybridcache.allocators.pages import PageAllocator
from hybridcache.allocators.slots import SlotAllocator
from hybridcache.tokens import Indices


class RowView(PageAllocator):
    """The KV rows of a ``BaseTokenToKVPoolAllocator``: rows from 0, its padding, to ``size``.

    ``give_back`` is owed after whatever may have evicted; until then the rows count as free.
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
        """Rows that can be had without evicting, those owed included. O(1)."""
        return self.num_unused

    @property
    def num_taken(self) -> int:
        """Rows that are cached or held. O(1)."""
        return int(self._theirs.size) - self.num_unused

    def allocate(self, num_tokens: int) -> Indices | None:
        """Rows for ``num_tokens`` tokens in whole pages; None if so many are not free. O(n)."""
        self.give_back()
        rows = self._theirs.alloc(-(-num_tokens // self.page_size) * self.page_size)
        return None if rows is None else to_host(rows)

    def free(self, rows: Indices) -> None:
        """Take back rows that a request held: whole pages. O(n)."""
        self.release(rows)

    def release(self, rows: Indices) -> None:
        """Take back rows that the cache kept; SGLang has them at the next ``give_back``. O(1)."""
        if len(rows):
            self._owed.append(rows)
            self._num_owed += len(rows)

    def give_back(self) -> None:
        """Hand what is owed to SGLang, in one call. O(rows owed)."""
        if self._owed:
            rows = self._owed[0] if len(self._owed) == 1 else np.concatenate(self._owed)
            self._owed.clear()
            self._num_owed = 0
            self._theirs.free(self.to_device(rows))

    def to_device(self, rows: Indices) -> torch.Tensor:
        """``rows`` as SGLang writes them: int64[n] on its device. O(n)."""
        there = torch.from_numpy(rows.astype(np.int64))
        return there if self._is_on_host else there.to(self._theirs.device, non_blocking=True)

    def free_rows(self) -> Indices:
        """All rows that are free or owed, in no order. O(capacity)."""
        page_size = self._theirs.page_size
        pages = to_host(self._theirs.get_all_free_pages())
        rows = pages[:, None] * page_size + np.arange(page_size, dtype=np.int32)
        return np.concatenate((rows.reshape(-1), *self._owed)).astype(np.int32)

    def check(self) -> None:
        """AssertionError: a row is free twice or out of range. O(capacity)."""
        rows = self.free_rows()
        assert len(np.unique(rows)) == len(rows), "a KV row is free twice"
        assert not len(rows) or (rows.min() > 0 and rows.max() < self.capacity), (
            "a free KV row is out of range"
        )


class SlotView(SlotAllocator):
    """The state slots of a ``MambaSlotAllocator``: 1 to ``size``; 0 is its padding."""

    def __init__(self, theirs: Any, state_bytes: int) -> None:
        self._theirs = theirs
        self.capacity = theirs.size + 1
        self.unit_bytes = state_bytes
        self.budget = None
        self._tensors = torch.arange(self.capacity, dtype=torch.int64, device=theirs.device)

    @property
    def num_unused(self) -> int:
        return int(self._theirs.available_size())

    @property
    def num_taken(self) -> int:
        """Slots that are cached or held. O(1)."""
        return int(self._theirs.size) - self.num_unused

    def allocate(self) -> int | None:
        """One slot, or None if none is free."""
        slot = self._theirs.alloc(1)
        return None if slot is None else int(slot)

    def free(self, slot: int) -> None:
        """Give ``slot`` to SGLang. O(its free list)."""
        self._theirs.free(self.tensor(slot))

    def tensor(self, slot: int) -> torch.Tensor:
        """``slot`` as SGLang writes it, int64[1] on its device: a view, not to be written. O(1)."""
        return self._tensors[slot : slot + 1]

    def free_slots(self) -> list[int]:
        """All free slots, in no order. O(capacity)."""
        slots: list[int] = self._theirs.free_slots.tolist()
        return slots

    def check(self) -> None:
        """AssertionError: a slot is free twice or out of range. O(capacity)."""
        slots = self.free_slots()
        assert len(set(slots)) == len(slots), "a slot is free twice"
        assert all(0 < slot < self.capacity for slot in slots), "a free slot is out of range"


def to_host(indices: torch.Tensor) -> Indices:
    """A tensor of indices as int32[n] on the host. O(n); on a GPU it waits for the stream."""
    rows: Indices = indices.cpu().numpy().astype(np.int32)
    return rows
