"""Drafters of tokens, and the planner that distributes them over a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from engine.requests.request import Request
from hybridcache.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens guessed to follow those of a request."""

    tokens: Tokens
    """int32[d], d of 1 or more."""
    source: str
    """The name of the drafter."""


class Newest(NamedTuple):
    """Newest token of a request, which is not computed yet, and the location of the tokens
    before it on the device."""

    row: int
    """Row in the request table."""
    slot: int
    """Slot of its state."""
    token_id: int
    position: int
    """1 or more."""


class Drafter(Protocol):
    """Source of drafts. A wrong draft costs time and changes no token.

    It is called between two steps, for all requests at once that may take drafts. A drafter that
    computes, such as the model's multi-token head, makes one pass over the batch. It reads a hidden
    vector of each request, declared as a state of the sequence: checkpoints save it, and commits
    move it on, as any other state.
    """

    @property
    def name(self) -> str: ...

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> Sequence[Tokens | None]:
        """Return a guess for each (request, most tokens), in order: int32[d], d from 0 to that
        number. None if the drafter needs more steps before it can say: it is asked again in the
        next one. A bounded time: all requests wait for it."""
        ...

    def forget(self, request: Request) -> None:
        """``request`` has ended."""
        ...

    def reset(self) -> None:
        """The cache was emptied: nothing is known of requests that ended."""
        ...


class DraftPlanner(Protocol):
    """Decides which decoding requests get drafts, and of which length; see ``Drafting``."""

    @property
    def requests(self) -> Set[Request]:
        """Requests with private state."""
        ...

    def propose(self, decoding: Sequence[tuple[Request, int]]) -> dict[Request, Draft]:
        """Return drafts for some of the (request, most tokens that still fit) that decode."""
        ...

    def may_guess(self, decoding: Iterable[Request]) -> bool:
        """Return True if any of them may get a draft in its next step."""
        ...

    def pass_over(self) -> None:
        """Count a step without drafts."""
        ...

    def learn(self, request: Request, draft: Draft, num_accepted: int) -> None:
        """Note how much of a draft was accepted."""
        ...

    def forget(self, request: Request) -> None:
        """Drop the state of a request that has ended."""
        ...

    def reset(self) -> None:
        """Drop statistics of ended requests: the cache was emptied."""
        ...
