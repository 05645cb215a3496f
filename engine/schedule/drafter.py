"""Interfaces of drafters, and of the planner that distributes drafts over a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from engine.requests.request import Request
from hybridcache.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens proposed as a continuation of a request."""

    tokens: Tokens
    """int32[d] with d of 1 or more."""
    source: str
    """Name of the drafter."""


class Newest(NamedTuple):
    """Newest token of a request, which is not computed yet, and where the device stores the tokens
    before it."""

    row: int
    """Row in the request table."""
    slot: int
    """State slot."""
    token_id: int
    position: int
    """Position of the token, 1 or more."""


class Drafter(Protocol):
    """Source of drafts. A wrong draft costs time but changes no token.

    It is called between two steps, once for all requests that may take drafts. A drafter that
    computes, such as the model's multi-token head, makes one pass over the batch. It reads a hidden
    vector of each request, declared as a state of the sequence: like any other state, it is saved
    with checkpoints and advanced by commits.
    """

    @property
    def name(self) -> str: ...

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> Sequence[Tokens | None]:
        """Return a draft for each (request, maximum number of tokens), in order: int32[d].

        None if the drafter needs more steps; the next step calls it again. Must take a bounded
        time, because all requests wait for it.
        """
        ...

    def forget(self, request: Request) -> None:
        """Drop the state of ``request``, which has ended."""
        ...

    def reset(self) -> None:
        """Drop the state of requests that ended: the cache was emptied."""
        ...


class DraftPlanner(Protocol):
    """Decides which decoding requests get drafts, and how long the drafts are; see ``Drafting``."""

    @property
    def requests(self) -> Set[Request]:
        """Requests with private state."""
        ...

    def propose(self, decoding: Sequence[tuple[Request, int]]) -> dict[Request, Draft]:
        """Return drafts for some of the decoding (request, maximum number of tokens that still
        fit)."""
        ...

    def may_guess(self, decoding: Iterable[Request]) -> bool:
        """Return True if any of them may get a draft in its next step."""
        ...

    def pass_over(self) -> None:
        """Count a step without drafts."""
        ...

    def learn(self, request: Request, draft: Draft, num_accepted: int) -> None:
        """Record how many tokens of a draft were accepted."""
        ...

    def forget(self, request: Request) -> None:
        """Drop the state of a request that has ended."""
        ...

    def reset(self) -> None:
        """Drop statistics of ended requests: the cache was emptied."""
        ...
