"""Outstanding work of one replica, derived from the requests sent to it without extra messages."""

from __future__ import annotations

from collections.abc import Hashable, Iterator


class ReplicaLoad:
    """Requests that were sent to one replica and have not ended, with estimated prefill seconds.

    All methods are O(1). A replica prefills in order of arrival, so it works on the oldest request
    without a first token.

    >>> load = ReplicaLoad()
    >>> load.sent("a", 2.0, now=0.0)
    >>> load.sent("b", 1.0, now=0.5)
    >>> load.wait_s(now=1.0)
    2.0
    >>> load.prefilled("a", now=2.5)
    >>> load.wait_s(now=3.0), load.num_waiting, load.num_running
    (0.5, 1, 2)
    """

    __slots__ = ("_decoding", "_head_since_s", "_seconds", "_waiting")

    def __init__(self) -> None:
        self._waiting: dict[Hashable, float] = {}
        """Estimated prefill seconds of each request without a first token, the oldest first."""
        self._seconds = 0.0
        self._head_since_s = 0.0
        self._decoding: set[Hashable] = set()

    @property
    def num_waiting(self) -> int:
        """Number of requests without a first token, including the one being computed."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Number of requests that have not ended."""
        return len(self._waiting) + len(self._decoding)

    def wait_s(self, now: float) -> float:
        """Return the seconds until all requests here have their first tokens.

        A prefill that exceeds its estimate counts as 0 because it can end at any moment.
        """
        if not self._waiting:
            return 0.0
        head = next(iter(self._waiting.values()))
        passed = min(max(now - self._head_since_s, 0.0), head)
        return max(self._seconds - passed, 0.0)

    def sent(self, request: Hashable, seconds: float, now: float) -> None:
        """Add ``request`` with an estimate of its prefill time.

        Raises ValueError if it is already present.
        """
        if request in self._waiting or request in self._decoding:
            raise ValueError(f"Request {request!r} is already at this replica.")
        if not self._waiting:
            self._head_since_s = now
        self._waiting[request] = seconds
        self._seconds += seconds

    def prefilled(self, request: Hashable, now: float) -> None:
        """Record the first token of a request. Unknown requests are ignored."""
        if self._drop(request, now):
            self._decoding.add(request)

    def ended(self, request: Hashable, now: float) -> None:
        """Remove a request. Unknown requests are ignored."""
        if not self._drop(request, now):
            self._decoding.discard(request)

    def _drop(self, request: Hashable, now: float) -> bool:
        seconds = self._waiting.get(request)
        if seconds is None:
            return False
        if next(iter(self._waiting)) == request:
            self._head_since_s = now
        del self._waiting[request]
        # Floating-point sums drift: an empty queue resets the sum to exactly 0.
        self._seconds = self._seconds - seconds if self._waiting else 0.0
        return True

    def requests(self) -> Iterator[Hashable]:
        """Yield all requests that have not ended, those without a first token first."""
        yield from self._waiting
        yield from self._decoding

    def check(self) -> None:
        """Raise AssertionError unless the sums match the requests. O(requests)."""
        assert not self._decoding & self._waiting.keys()
        assert abs(self._seconds - sum(self._waiting.values())) < 1e-6 * (1 + self._seconds)
        assert self._waiting or self._seconds == 0.0
