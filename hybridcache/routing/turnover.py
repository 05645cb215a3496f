"""How fast one replica's memory is written over, and how busy that keeps it."""

from __future__ import annotations

from collections import deque


class Turnover:
    """Bytes that were sent to one replica to be stored, the prefill seconds that came with them,
    and when: as far back as one memory full reaches. Under LRU what goes next has been unused for
    about that long.

    ``sent`` O(1), amortised; the others O(1).

    >>> turnover = Turnover(100, now=0.0)
    >>> for second in range(1, 5):
    ...     turnover.sent(50, 0.25, now=float(second))
    >>> turnover.rate(now=4.0), turnover.rate(now=8.0), turnover.work_s
    (50.0, 16.666666666666668, 0.5)
    """

    __slots__ = ("_bytes", "_capacity", "_log", "_seconds")

    def __init__(self, capacity_bytes: int | None, now: float) -> None:
        self._capacity = capacity_bytes
        self._bytes, self._seconds = 0, 0.0
        self._log: deque[tuple[float, int, float]] = deque([(now, 0, 0.0)])
        """(when, all bytes and all seconds until then, with these), the oldest first."""

    def sent(self, num_bytes: int, seconds: float, now: float) -> None:
        """So many more, ``now`` never less than before."""
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
        """When the last memory full began; where there was none, when the replica joined."""
        return self._log[0][0]

    @property
    def work_s(self) -> float:
        """Seconds of prefill that were sent here since then."""
        return self._seconds - self._log[0][2]

    def rate(self, now: float) -> float:
        """Bytes a second since then; 0 where that is no time."""
        since, before, _ = self._log[0]
        return (self._bytes - before) / (now - since) if now > since else 0.0

    def check(self) -> None:
        """AssertionError unless it reaches back one memory full, and no further than it must."""
        times, sums, seconds = zip(*self._log, strict=True)
        assert all(list(column) == sorted(column) for column in (times, sums, seconds))
        assert sums[-1] <= self._bytes and seconds[-1] <= self._seconds
        if self._capacity is not None and len(sums) > 2:
            assert sums[1] > self._bytes - self._capacity
