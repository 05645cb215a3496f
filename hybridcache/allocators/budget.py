"""One number of bytes for two kinds of things: KV pages and states drawn from the same memory."""

from __future__ import annotations


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
