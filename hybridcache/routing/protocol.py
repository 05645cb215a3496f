"""What a router is: a plain object that is notified of replicas, requests and events, and answers
where the next request goes. It calls nobody, so the laboratory and the engine drive the same."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from hybridcache.export.events import Event
from hybridcache.policies.protocol import PlacementPolicy
from hybridcache.routing.load import Load

ReplicaId = int | str
"""Never used again for another replica: one that comes back is a new one, and empty."""


class Seconds(Protocol):
    """Seconds of a prefill, by whatever model of the machine (``hybridcache.geometry.times``)."""

    def seconds(self, start: int, end: int) -> float:
        """To compute tokens [start, end) after ``start`` reused ones."""
        ...


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """What all replicas of a fleet have in common."""

    times: Seconds
    unit: int = 1
    """Tokens that one id stands for."""
    page_size: int = 1
    """In ids, and so the next two."""
    grid: int = 64
    kv_bytes: int = 0
    """Of one id's KV."""
    state_bytes: int = 0
    capacity_bytes: int | None = None
    """For KV and states of one replica; None: not known, and never full."""
    stateful: bool = True
    """False: attention only, any position of the grid can be resumed."""
    placement: PlacementPolicy | None = None
    """Where the replicas save states, numbers in ids; None: not known."""
    seed: int = 0
    """For those that draw lots."""


class RouteRequest(NamedTuple):
    """What a router knows of a request."""

    id: Hashable
    """Its own for as long as it runs."""
    tokens: tuple[int, ...]
    namespace: Hashable = None
    session: Hashable = None
    """What a client says belongs together; None: it does not say."""
    boundaries: tuple[int, ...] = ()
    """Positions known to survive into later prompts, as the cache's placement is given them."""


class Choice(NamedTuple):
    """Where a request goes."""

    replica: ReplicaId
    expected_len: int = 0
    """Ids that the router expects not to be computed there."""


class NoReplica(RuntimeError):
    """A request came while no replica was up."""


class Router:
    """Keeps who is there and what each still has to do; a router of one's own overrides ``choose``.

    ``__init__`` takes a ``ReplicaSpec``; other arguments need names and defaults.
    """

    follows_events: ClassVar[bool] = False
    """Whether ``on_events`` does anything: nobody sends events to whom they mean nothing."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self.spec = spec
        self.loads: dict[ReplicaId, Load] = {}
        """By replica that is up, the oldest first."""
        self._where: dict[Hashable, ReplicaId] = {}

    def choose(self, request: RouteRequest, now: float) -> Choice:
        """The replica for ``request``, one of ``loads``, of which there is one at least. Changes
        nothing that ``loads`` holds."""
        raise TypeError(f"{type(self).__name__} is a router without a rule: override choose")

    def route(self, request: RouteRequest, now: float) -> Choice:
        """Choose, and count the request there. ``now``: seconds, never fewer than before.
        NoReplica: none is up; ValueError: ``choose`` named one that is not."""
        if not self.loads:
            raise NoReplica("no replica is up: try again when one has joined")
        choice = self.choose(request, now)
        load = self.loads.get(choice.replica)
        if load is None:
            raise ValueError(
                f"{type(self).__name__} chose replica {choice.replica!r}, which is not up"
            )
        load.sent(request.id, self.seconds(choice.expected_len, len(request.tokens)), now)
        self._where[request.id] = choice.replica
        self.routed(request, choice, now)
        return choice

    def routed(self, request: RouteRequest, choice: Choice, now: float) -> None:
        """``request`` was counted where ``choose`` sent it: for routers that remember more."""

    def prefilled(self, request: Hashable, now: float) -> None:
        """The first token of a request's answer has come. O(1)."""
        where = self._where.get(request)
        if where is not None:
            self.loads[where].prefilled(request, now)

    def ended(self, request: Hashable, now: float) -> None:
        """A request is over: answered, aborted or failed. O(1)."""
        where = self._where.pop(request, None)
        if where is not None:
            self.loads[where].ended(request, now)

    def joined(self, replica: ReplicaId, now: float) -> None:
        """A replica is up, its cache empty. ValueError: it is known."""
        if replica in self.loads:
            raise ValueError(f"replica {replica!r} has joined already")
        self.loads[replica] = Load()

    def left(self, replica: ReplicaId, now: float) -> tuple[Hashable, ...]:
        """A replica is gone, with its cache; returns the requests that were there, and are no
        longer counted anywhere."""
        load = self.loads.pop(replica, None)
        lost = () if load is None else tuple(load.requests())
        for request in lost:
            del self._where[request]
        return lost

    def on_events(
        self,
        replica: ReplicaId,
        sequence: int,
        events: Iterable[Event],
        covered: Iterable[Hashable] = (),
    ) -> None:
        """Batch number ``sequence`` of what changed in a replica's cache, late perhaps, each once
        and in order. ``covered``: requests whose prompts were computed since the batch before, so
        that what they left is in it. EventsLost: it can not follow those before it."""

    def seconds(self, start: int, end: int) -> float:
        """Of computing ids [start, end) of a prompt."""
        unit = self.spec.unit
        return self.spec.times.seconds(start * unit, end * unit)

    def least_loaded(self) -> ReplicaId:
        """With the fewest running requests; of equal ones that which joined first."""
        return min(self.loads, key=lambda replica: self.loads[replica].num_running)

    def check(self) -> None:
        """AssertionError unless all that is counted is counted once. O(what it holds)."""
        for load in self.loads.values():
            load.check()
        counted = [each for load in self.loads.values() for each in load.requests()]
        assert sorted(map(repr, counted)) == sorted(map(repr, self._where))
        assert all(request in self._requests_of(at) for request, at in self._where.items())

    def _requests_of(self, replica: ReplicaId) -> Iterator[Hashable]:
        return self.loads[replica].requests()
