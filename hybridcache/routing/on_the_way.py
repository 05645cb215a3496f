"""What a replica is about to hold: prompts that were sent to it and that its events do not cover
yet, with the checkpoints that each will leave."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterable

from hybridcache.routing.protocol import RouteRequest


class OnTheWay:
    """Of one replica. As many as run there, and those that ended since its last events.

    >>> way = OnTheWay()
    >>> way.sent(RouteRequest("a", (1, 2, 3, 4, 5)), (2, 4), num_new=5)
    >>> way.depth(RouteRequest("b", (1, 2, 3, 9)))
    2
    """

    __slots__ = ("_prompts", "num_new")

    def __init__(self) -> None:
        self._prompts: dict[Hashable, tuple[RouteRequest, tuple[int, ...], int]] = {}
        self.num_new = 0
        """Ids that they store there beyond what was there."""

    def __len__(self) -> int:
        return len(self._prompts)

    def requests(self) -> Iterable[Hashable]:
        """Return the ids of the requests, the oldest first."""
        return tuple(self._prompts)

    def sent(self, request: RouteRequest, positions: Iterable[int], num_new: int) -> None:
        """``request`` goes here, and will leave a checkpoint at each of ``positions``. O(n log n)
        in them."""
        self._prompts[request.id] = request, tuple(sorted(positions)), num_new
        self.num_new += num_new

    def over(self, request: Hashable) -> None:
        """Events cover what it left, or it leaves nothing; one that is not here changes nothing."""
        found = self._prompts.pop(request, None)
        if found is not None:
            self.num_new -= found[2]

    def depth(self, request: RouteRequest) -> int:
        """Ids of ``request`` that can be resumed here once all that is on the way has come.
        O(requests on the way + what they share with it)."""
        deepest = 0
        for other, positions, _ in self._prompts.values():
            if other.namespace == request.namespace and positions and positions[-1] > deepest:
                shared = min(_shared(other.tokens, request.tokens), len(request.tokens) - 1)
                number = bisect_right(positions, shared)
                if number:
                    deepest = max(deepest, positions[number - 1])
        return deepest

    def check(self) -> None:
        """AssertionError unless its sum is that of what is here."""
        assert self.num_new == sum(num_new for _, _, num_new in self._prompts.values())


_BLOCK = 256
"""Ids that are compared at once."""


def _shared(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """How long both begin alike."""
    shorter, start = min(len(left), len(right)), 0
    while start < shorter:
        end = min(start + _BLOCK, shorter)
        if left[start:end] != right[start:end]:
            break
        start = end
    while start < shorter and left[start] == right[start]:
        start += 1
    return start
