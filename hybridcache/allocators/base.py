"""Interface of all allocators, and the byte budget that several can share."""

from __future__ import annotations

from abc import ABC, abstractmethod


class ByteBudget:
    """Counter of free bytes, which the allocators that share it change.

    >>> budget = ByteBudget(100)
    >>> budget.free_bytes -= 60
    >>> budget.free_bytes
    40
    >>> budget.free_bytes += 60
    >>> budget.free_bytes
    100
    """

    __slots__ = ("free_bytes", "total_bytes")

    def __init__(self, total_bytes: int) -> None:
        """Raise ValueError if ``total_bytes`` is not positive."""
        if total_bytes <= 0:
            raise ValueError(f"total_bytes must be positive, got {total_bytes}")
        self.total_bytes = total_bytes
        self.free_bytes = total_bytes


class BaseAllocator(ABC):
    """Allocator of units of one kind from a fixed range of indices, each with one owner at a time.

    With a ``budget``, several allocators share one number of bytes, and each can allocate only the
    rest. Allocators evict nothing: they return None if a request does not fit.
    """

    def __init__(self, capacity: int, unit_bytes: int, budget: ByteBudget | None):
        """Raise ValueError if ``capacity`` is negative, or a ``budget`` has no ``unit_bytes``."""
        if capacity < 0:
            raise ValueError(f"capacity must not be negative, got {capacity}")
        if budget is not None and unit_bytes < 1:
            raise ValueError(f"a share of a budget needs the bytes of one unit, got {unit_bytes}")
        self.capacity = capacity
        """Total number of units."""
        self.unit_bytes = unit_bytes
        self.budget = budget

    @property
    @abstractmethod
    def num_unused(self) -> int:
        """Number of unallocated units, even if the budget does not allow to take them. O(1)."""

    @property
    def num_free(self) -> int:
        """Number of units that ``allocate`` can return now. O(1)."""
        if self.budget is None:
            return self.num_unused
        return min(self.num_unused, self.budget.free_bytes // self.unit_bytes)

    @property
    def num_taken(self) -> int:
        """Number of allocated units. O(1)."""
        return self.capacity - self.num_unused

    @abstractmethod
    def check(self) -> None:
        """Check that every free index is in range and listed once. O(capacity).

        Raises:
            AssertionError: one is not.
        """
