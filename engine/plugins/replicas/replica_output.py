"""Calls to a replica, facts about it, and its answers."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import structs

from engine.messages import Abort, EngineFacts, Question
from engine.requests.request import RequestSpec
from engine.text.outputs import RequestOutput
from hybridcache.geometry.units import counted
from hybridcache.routing.protocol import ReplicaSpec, RouteRequest


@dataclass(frozen=True, slots=True)
class Order:
    """The only argument of every call to a replica."""

    request_id: str = ""
    spec: RequestSpec | None = None
    route: RouteRequest | None = None
    """Input of the router. None if ``replica`` names the destination."""
    replica: str | None = None
    sequence: int = 0
    """Number of the batch of events that is requested."""
    message: Question | Abort | None = None
    """Message to the engine of the replica."""
    address: str = ""
    """Address of the server, for the start screen."""


@dataclass(frozen=True, slots=True)
class PerToken:
    """A constant rate that a replica measured at its start."""

    tokens_per_s: float

    def seconds(self, start: int, end: int) -> float:
        """Return the seconds to compute the tokens [start, end)."""
        return max(end - start, 0) / self.tokens_per_s


@dataclass(frozen=True, slots=True)
class ReplicaFacts:
    """Facts about the engines for the server and its router."""

    engine: EngineFacts
    spec: ReplicaSpec
    screen: tuple[tuple[str, str], ...]
    """Rows of the start screen of one engine; only its speed if the order had no address."""


class Diverged(Exception):
    """A repeated answer differs from what was sent already."""


class Progress:
    """The outputs of one request so far, as its replica sent them.

    A request whose replica died is computed again, with the same seed. The part that was sent
    already is compared and left out.
    """

    def __init__(self, request_id: str) -> None:
        """``request_id`` replaces the id in the outputs."""
        self.request_id = request_id
        self._tokens: list[int] = []
        self._num_chars = 0
        self._at_token = self._at_char = 0
        """Tokens and characters that the present replica has sent."""
        self._last = RequestOutput(request_id)

    @property
    def has_begun(self) -> bool:
        """True if the present replica has sent a token."""
        return self._at_token > 0

    def restart(self) -> None:
        """Expect the answer from its beginning."""
        self._at_token = self._at_char = 0

    def add(self, delta: RequestOutput) -> RequestOutput:
        """Return the new part of the next output, with the id of the front end. O(new tokens).

        Raises Diverged if a repeated token is another one.
        """
        tokens, text = delta.new_token_ids, delta.new_text
        repeated = self._tokens[self._at_token : self._at_token + len(tokens)]
        if repeated != list(tokens[: len(repeated)]):
            raise Diverged
        num_chars = min(len(text), self._num_chars - self._at_char)
        self._at_token += len(tokens)
        self._at_char += len(text)
        new = tokens[len(repeated) :]
        self._tokens += new
        self._num_chars = max(self._num_chars, self._at_char)
        self._last = structs.replace(
            delta,
            request_id=self.request_id,
            new_token_ids=new,
            new_text=text[num_chars:],
            new_logprobs=delta.new_logprobs[len(repeated) :],
            num_tokens=len(self._tokens),
            num_chars=self._num_chars,
        )
        return self._last

    @property
    def broken_off(self) -> str:
        """Message for a client after the replica of its request died."""
        return (
            f"the replica that computed it died after {counted(len(self._tokens), 'token')} of the "
            "answer; send the request again"
        )

    def aborted(self) -> RequestOutput:
        """Return the last output of an aborted answer."""
        return structs.replace(
            self._last, new_token_ids=(), new_text="", new_logprobs=(), finish_reason="abort"
        )
