"""Allocator of state slots and request rows, one index at a time."""

from __future__ import annotations

from operator import index

from hybridcache.allocators.base import BaseAllocator, ByteBudget


class SlotAllocator(BaseAllocator):
    """Stack of free slots. The slot freed last is returned first. Every operation is O(1).

    >>> slots = SlotAllocator(2)
    >>> slots.allocate(), slots.allocate(), slots.allocate()
    (0, 1, None)
    >>> slots.free(1)
    >>> slots.num_free
    1
    """

    def __init__(
        self, num_slots: int, slot_bytes: int = 0, budget: ByteBudget | None = None
    ) -> None:
        super().__init__(num_slots, slot_bytes, budget)
        self._stack = list(range(num_slots - 1, -1, -1))

    @property
    def num_unused(self) -> int:
        return len(self._stack)

    def allocate(self) -> int | None:
        """Return a slot, or None if none is free. O(1)."""
        if not self._stack:
            return None
        if self.budget is not None:
            if self.budget.free_bytes < self.unit_bytes:
                return None
            self.budget.free_bytes -= self.unit_bytes
        return self._stack.pop()

    def free(self, slot: int) -> None:
        """Return ``slot``, which was allocated, to the pool. O(1).

        A slot that is freed twice while others are allocated is found only by ``check``, because it
        would need a search.

        Raises:
            ValueError: the slot is out of range, or no slot is allocated.
            TypeError: it is not an integer.
        """
        if not 0 <= index(slot) < self.capacity:
            raise ValueError(f"slot {slot} is not one of {self.capacity}")
        if len(self._stack) == self.capacity:
            raise ValueError(f"slot {slot} given back, but none is allocated")
        if self.budget is not None:
            self.budget.free_bytes += self.unit_bytes
        self._stack.append(slot)

    def free_slots(self) -> list[int]:
        """Return all unused slots, unordered. O(capacity)."""
        return list(self._stack)

    def check(self) -> None:
        assert len(set(self._stack)) == len(self._stack), "a slot is free twice"
        assert all(0 <= slot < self.capacity for slot in self._stack), "a free slot is out of range"
