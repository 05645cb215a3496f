"""Prompts in flight: sent to a replica and not covered by its events, with their checkpoints."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterable

from hybridcache.routing.protocol import RouteRequest


class InFlightPrompts:
    """Prompts in flight to one replica: running requests, and those that ended since its events.

    >>> way = InFlightPrompts()
    >>> way.sent(RouteRequest("a", (1, 2, 3, 4, 5)), (2, 4), num_new=5)
    >>> way.depth(RouteRequest("b", (1, 2, 3, 9)))
    2
    """

    __slots__ = ("_prompts", "num_new")

    def __init__(self) -> None:
        self._prompts: dict[Hashable, tuple[RouteRequest, tuple[int, ...], int]] = {}
        self.num_new = 0
        """Number of ids that these prompts will store in addition to the present contents."""

    def __len__(self) -> int:
        return len(self._prompts)

    def requests(self) -> Iterable[Hashable]:
        """Return the ids of the requests, the oldest first."""
        return tuple(self._prompts)

    def sent(self, request: RouteRequest, positions: Iterable[int], num_new: int) -> None:
        """Add ``request``, which will save a checkpoint at each of ``positions``. O(n log n)."""
        self._prompts[request.id] = request, tuple(sorted(positions)), num_new
        self.num_new += num_new

    def over(self, request: Hashable) -> None:
        """Remove a request that events cover or that stores nothing. Unknown ids are ignored."""
        found = self._prompts.pop(request, None)
        if found is not None:
            self.num_new -= found[2]

    def depth(self, request: RouteRequest) -> int:
        """Number of ids of ``request`` that can be resumed after all prompts here are computed.

        O(prompts in flight + shared ids).
        """
        deepest = 0
        for other, positions, _ in self._prompts.values():
            if other.namespace == request.namespace and positions and positions[-1] > deepest:
                shared = min(_shared(other.tokens, request.tokens), len(request.tokens) - 1)
                number = bisect_right(positions, shared)
                if number:
                    deepest = max(deepest, positions[number - 1])
        return deepest

    def check(self) -> None:
        """Raise AssertionError unless ``num_new`` is the sum over all prompts."""
        assert self.num_new == sum(num_new for _, _, num_new in self._prompts.values())


_BLOCK = 256
"""Number of ids compared per step."""


def _shared(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Return the length of the common prefix."""
    shorter, start = min(len(left), len(right)), 0
    while start < shorter:
        end = min(start + _BLOCK, shorter)
        if left[start:end] != right[start:end]:
            break
        start = end
    while start < shorter and left[start] == right[start]:
        start += 1
    return start
