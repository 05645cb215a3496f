"""What one replica still has to do, as its router knows it: nothing is asked over the wire."""

from __future__ import annotations

from collections.abc import Hashable, Iterator


class Load:
    """Requests that were sent to one replica and have not ended, and the seconds of prefill they
    were estimated at. All verbs O(1).

    A replica prefills in the order in which requests came to it; what it works on is the oldest of
    those without a first token.

    >>> load = Load()
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
        """Estimated seconds of each that has no first token yet, the oldest first."""
        self._seconds = 0.0
        self._head_since_s = 0.0
        self._decoding: set[Hashable] = set()

    @property
    def num_waiting(self) -> int:
        """Requests without a first token, the one that is computed among them."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that have not ended."""
        return len(self._waiting) + len(self._decoding)

    def wait_s(self, now: float) -> float:
        """Until what is here has its first tokens. What takes longer than was estimated ends any
        moment: it counts nothing."""
        if not self._waiting:
            return 0.0
        head = next(iter(self._waiting.values()))
        passed = min(max(now - self._head_since_s, 0.0), head)
        return max(self._seconds - passed, 0.0)

    def sent(self, request: Hashable, seconds: float, now: float) -> None:
        """``request`` goes here, its prefill estimated at ``seconds``. ValueError: it is here."""
        if request in self._waiting or request in self._decoding:
            raise ValueError(f"request {request!r} is at this replica already")
        if not self._waiting:
            self._head_since_s = now
        self._waiting[request] = seconds
        self._seconds += seconds

    def prefilled(self, request: Hashable, now: float) -> None:
        """It has its first token; one that is not here changes nothing."""
        if self._drop(request, now):
            self._decoding.add(request)

    def ended(self, request: Hashable, now: float) -> None:
        """It is over, however it ended; one that is not here changes nothing."""
        if not self._drop(request, now):
            self._decoding.discard(request)

    def _drop(self, request: Hashable, now: float) -> bool:
        seconds = self._waiting.get(request)
        if seconds is None:
            return False
        if next(iter(self._waiting)) == request:
            self._head_since_s = now
        del self._waiting[request]
        # Sums that are added to and taken from drift: an empty queue is nothing, exactly.
        self._seconds = self._seconds - seconds if self._waiting else 0.0
        return True

    def requests(self) -> Iterator[Hashable]:
        """All that have not ended, those without a first token first."""
        yield from self._waiting
        yield from self._decoding

    def check(self) -> None:
        """AssertionError unless its sums are those of what is here. O(requests)."""
        assert not self._decoding & self._waiting.keys()
        assert abs(self._seconds - sum(self._waiting.values())) < 1e-6 * (1 + self._seconds)
        assert self._waiting or self._seconds == 0.0
