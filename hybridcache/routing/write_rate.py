"""Write rate and utilisation of one replica's memory."""

from __future__ import annotations

from collections import deque


class WriteRate:
    """Log of the bytes stored on one replica and of the prefill seconds that they took.

    It covers the last ``capacity_bytes`` written. Under LRU, the next eviction victim has been
    unused for about that period. ``sent`` is O(1) amortised, the other methods O(1).

    >>> write_rate = WriteRate(100, now=0.0)
    >>> for second in range(1, 5):
    ...     write_rate.sent(50, 0.25, now=float(second))
    >>> write_rate.rate(now=4.0), write_rate.rate(now=8.0), write_rate.work_s
    (50.0, 16.666666666666668, 0.5)
    """

    __slots__ = ("_bytes", "_capacity", "_log", "_seconds")

    def __init__(self, capacity_bytes: int | None, now: float) -> None:
        self._capacity = capacity_bytes
        self._bytes, self._seconds = 0, 0.0
        self._log: deque[tuple[float, int, float]] = deque([(now, 0, 0.0)])
        """Entries (time, total bytes, total seconds), the oldest first. Totals are cumulative."""

    def sent(self, num_bytes: int, seconds: float, now: float) -> None:
        """Add one request. ``now`` must not decrease between calls."""
        self._bytes += num_bytes
        self._seconds += seconds
        if self._capacity is None or not num_bytes:
            return
        self._log.append((now, self._bytes, self._seconds))
        while self._log[1][1] <= self._bytes - self._capacity:
            if len(self._log) == 2:
                break
            self._log.popleft()

    @property
    def since_s(self) -> float:
        """Start of the log: one capacity ago, or the time at which the replica joined."""
        return self._log[0][0]

    @property
    def work_s(self) -> float:
        """Prefill seconds sent to the replica since ``since_s``."""
        return self._seconds - self._log[0][2]

    def rate(self, now: float) -> float:
        """Bytes per second since ``since_s``, or 0 if no time has passed.

        Periods under a microsecond count as one: a quotient by less can overflow.
        """
        since, before, _ = self._log[0]
        return (self._bytes - before) / max(now - since, 1e-6) if now > since else 0.0

    def check(self) -> None:
        """Raise AssertionError unless the log covers one capacity and no more than needed."""
        times, sums, seconds = zip(*self._log, strict=True)
        assert all(list(column) == sorted(column) for column in (times, sums, seconds))
        assert sums[-1] <= self._bytes and seconds[-1] <= self._seconds
        if self._capacity is not None and len(sums) > 2:
            assert sums[1] > self._bytes - self._capacity
