"""The interface of all allocators, and the byte budget that they can share."""

from __future__ import annotations

from abc import ABC, abstractmethod


class ByteBudget:
    """Counts bytes; knows nothing of what they are for.

    >>> budget = ByteBudget(100)
    >>> budget.take(60)
    >>> budget.free_bytes
    40
    >>> budget.give_back(60)
    >>> budget.free_bytes
    100
    """

    __slots__ = ("free_bytes", "total_bytes")

    def __init__(self, total_bytes: int) -> None:
        """ValueError: no bytes."""
        if total_bytes <= 0:
            raise ValueError(f"total_bytes must be positive, got {total_bytes}")
        self.total_bytes = total_bytes
        self.free_bytes = total_bytes

    def take(self, num_bytes: int) -> None:
        """The caller has made sure that they are free."""
        self.free_bytes -= num_bytes

    def give_back(self, num_bytes: int) -> None:
        self.free_bytes += num_bytes


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
