"""What may guess the next tokens of a request."""

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
    """A request's newest token, which is not computed yet, and where the device has what came
    before it."""

    row: int
    """Of the request table."""
    slot: int
    """Of its state."""
    token_id: int
    position: int
    """1 or more."""


class Drafter(Protocol):
    """Guesses tokens. A wrong guess costs time, never a token: what the model chooses is what
    counts.

    It is asked between two steps, for all requests at once that may take drafts: so one that
    computes (a model's own prediction head) makes one pass over the batch. Such a one reads what
    the last step left on the device for each request: a hidden vector declared as a state of the
    sequence is saved in checkpoints, kept for each verified token and moved on by what was taken,
    as every other state.
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
        """Requests with state of their own."""
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
        """Drop what was learnt from ended requests: the cache was emptied."""
        ...
