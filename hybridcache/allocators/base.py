"""What every allocator of this package can say about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod

from hybridcache.allocators.budget import ByteBudget


class BaseAllocator(ABC):
    """Hands out units of one kind from a fixed range of indices, each to one owner at a time.

    With a ``budget`` the units of several allocators share one number of bytes; then what can be
    taken is also limited by what the others have left. Nothing here evicts: a request that does not
    fit is refused with None.
    """

    def __init__(self, capacity: int, unit_bytes: int = 0, budget: ByteBudget | None = None):
        """ValueError: a negative ``capacity``, a ``budget`` without the bytes of a unit."""
        if capacity < 0:
            raise ValueError(f"capacity must not be negative, got {capacity}")
        if budget is not None and unit_bytes < 1:
            raise ValueError(f"a share of a budget needs the bytes of one unit, got {unit_bytes}")
        self.capacity = capacity
        """Units in all."""
        self.unit_bytes = unit_bytes
        self.budget = budget

    @property
    @abstractmethod
    def num_unused(self) -> int:
        """Unallocated units, whether or not the budget would let them be taken. O(1)."""

    @property
    def num_free(self) -> int:
        """Units that ``allocate`` can hand out now. O(1)."""
        if self.budget is None:
            return self.num_unused
        return min(self.num_unused, self.budget.free_bytes // self.unit_bytes)

    @property
    def num_taken(self) -> int:
        """Allocated units. O(1)."""
        return self.capacity - self.num_unused

    @abstractmethod
    def check(self) -> None:
        """AssertionError unless every free index is in range and listed once. O(capacity)."""
