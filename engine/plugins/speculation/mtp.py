"""Drafts of the model's own multi-token head."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine.requests.request import Request
from engine.schedule.drafter import Newest
from hybridcache.tokens import Tokens

Guess = Callable[[Sequence[Newest], Sequence[int]], Sequence[Tokens]]
"""As ``Runner.guess``."""


class HeadDrafter:
    """What the multi-token head takes to follow, chained: one pass of it a token, for all requests
    together. It reads what the last step left on the device, so that a request which resumed from
    the cache is drafted for as any other."""

    name = "mtp"

    def __init__(self, guess: Guess) -> None:
        self._guess = guess

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> Sequence[Tokens | None]:
        if not wanted:
            return []
        return self._guess([_newest(request) for request, _ in wanted], [n for _, n in wanted])

    def forget(self, request: Request) -> None:
        pass

    def reset(self) -> None:
        pass


def _newest(request: Request) -> Newest:
    lease, row = request.claims
    assert lease.state_slot is not None, "a head keeps a state"
    return Newest(row, lease.state_slot, int(request.tokens[-1]), request.num_tokens - 1)
