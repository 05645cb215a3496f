"""Router interface: an object that is notified of replicas, requests and events, and calls nothing,
so that the simulator and the engine use the same class."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from hybridcache.adapters.events import Event
from hybridcache.radix.offload import PrefillTimes
from hybridcache.radix.protocol import PlacementPolicy
from hybridcache.radix.tokens import Tokens

ReplicaId = int | str
"""Identifier of a replica. Never reused: a replica that returns gets a new id and is empty."""


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """Properties that all replicas of a fleet share."""

    times: PrefillTimes
    unit: int = 1
    """Tokens per id."""
    page_size: int = 1
    """Page size in ids."""
    grid: int = 64
    """Checkpoint grid in ids."""
    kv_bytes: int = 0
    """Size of one id's KV."""
    state_bytes: int = 0
    capacity_bytes: int | None = None
    """Memory for KV and states of one replica, or None if unknown (treated as unlimited)."""
    stateful: bool = True
    """False for attention-only models, which can resume at any position of the grid."""
    placement: PlacementPolicy | None = None
    """Placement policy of the replicas with positions in ids, or None if unknown."""


class RouteRequest(NamedTuple):
    """Request as seen by a router."""

    id: Hashable
    """Unique among running requests."""
    tokens: Tokens
    """Ids of the prompt, int32[n]."""
    namespace: Hashable = None
    boundaries: tuple[int, ...] = ()
    """Positions that later prompts are known to share, as passed to the placement policy."""


class Choice(NamedTuple):
    """Chosen replica for a request."""

    replica: ReplicaId
    expected_len: int = 0
    """Number of ids that the router expects to be reused on the replica."""


class ReplicaLoad:
    """Requests that were sent to one replica and have not ended, with estimated prefill seconds.

    A replica prefills in order of arrival, so it works on the oldest request without a first token.

    >>> load = ReplicaLoad()
    >>> load.sent("a", 2.0, now=0.0)
    >>> load.sent("b", 1.0, now=0.5)
    >>> load.wait_s(now=1.0)
    2.0
    >>> load.prefilled("a", now=2.5)
    >>> load.wait_s(now=3.0), len(load.waiting), load.num_running
    (0.5, 1, 2)
    """

    def __init__(self) -> None:
        self.waiting: OrderedDict[Hashable, float] = OrderedDict()
        """Estimated prefill seconds of each request without a first token, the oldest first."""
        self._head_since_s = 0.0
        self._decoding: set[Hashable] = set()

    @property
    def num_running(self) -> int:
        """Number of requests that have not ended."""
        return len(self.waiting) + len(self._decoding)

    def work(self) -> tuple[float, float, float]:
        """Return (estimated seconds of all requests without a first token, those of the oldest, its
        start). O(waiting)."""
        head = next(iter(self.waiting.values()), 0.0)
        return sum(self.waiting.values()), head, self._head_since_s

    def wait_s(self, now: float) -> float:
        """Return the seconds until all requests here have their first tokens. A prefill that
        exceeds its estimate counts as 0. O(waiting)."""
        waiting, head, since = self.work()
        return max(waiting - min(max(now - since, 0.0), head), 0.0)

    def sent(self, request: Hashable, seconds: float, now: float) -> None:
        """Add ``request`` with an estimate of its prefill time."""
        if not self.waiting:
            self._head_since_s = now
        self.waiting[request] = seconds

    def prefilled(self, request: Hashable, now: float) -> None:
        """Record the first token of a request. Unknown requests are ignored."""
        if self._drop(request, now):
            self._decoding.add(request)

    def ended(self, request: Hashable, now: float) -> None:
        """Remove a request. Unknown requests are ignored."""
        if not self._drop(request, now):
            self._decoding.discard(request)

    def _drop(self, request: Hashable, now: float) -> bool:
        if request not in self.waiting:
            return False
        if next(iter(self.waiting)) == request:
            self._head_since_s = now
        del self.waiting[request]
        return True

    def requests(self) -> Iterator[Hashable]:
        yield from self.waiting
        yield from self._decoding


class NoReplica(RuntimeError):
    """Raised if a request arrives while no replica is up."""


class Router:
    """Base class: tracks replicas and their outstanding work. Subclasses override ``choose``.

    ``__init__`` takes a ``ReplicaSpec``. Further arguments need names and defaults.
    """

    follows_events: ClassVar[bool] = False
    """True if ``on_events`` has an effect. Other routers receive no events."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self.spec = spec
        self.loads: dict[ReplicaId, ReplicaLoad] = {}
        """Load of each replica that is up, in the order in which they joined."""
        self._where: dict[Hashable, ReplicaId] = {}

    def choose(self, request: RouteRequest, now: float) -> Choice:
        """Return the replica for ``request``, one of ``loads`` (never empty), to which it is sent
        then. Must not change ``loads``."""
        raise NotImplementedError

    def route(self, request: RouteRequest, now: float) -> Choice:
        """Choose a replica and count the request as sent to it.

        ``now`` is the time in seconds, finite. It must not decrease between calls of any method.
        Raises NoReplica if no replica is up, and ValueError, with nothing counted, if the id is
        that of a running request or ``choose`` returned no replica that is up.
        """
        if request.id in self._where:
            raise ValueError(
                f"id {request.id!r} is that of a running request: end it first, or use another."
            )
        if not self.loads:
            raise NoReplica("No replica is up. Try again when one has joined.")
        choice, num_ids = self.choose(request, now), len(request.tokens)
        if not isinstance(choice, Choice) or choice.replica not in self.loads:
            name = type(self).__name__
            raise ValueError(f"{name}.choose must return a Choice of a replica (got {choice!r}).")
        self.loads[choice.replica].sent(request.id, self.seconds(choice.expected_len, num_ids), now)
        self._where[request.id] = choice.replica
        return choice

    def prefilled(self, request: Hashable, now: float) -> None:
        """Record that the first token of a request has arrived. O(1)."""
        where = self._where.get(request)
        if where is not None:
            self.loads[where].prefilled(request, now)

    def ended(self, request: Hashable, now: float) -> None:
        """Record that a request has ended: answered, aborted or failed. O(1)."""
        where = self._where.pop(request, None)
        if where is not None:
            self.loads[where].ended(request, now)

    def joined(self, replica: ReplicaId, now: float) -> None:
        """Add a replica with an empty cache."""
        self.loads[replica] = ReplicaLoad()

    def left(self, replica: ReplicaId, now: float) -> tuple[Hashable, ...]:
        """Remove a replica. Returns its outstanding requests, which are no longer counted."""
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
        epoch: int = 0,
    ) -> None:
        """Process one batch of changes of a replica's cache.

        Batches arrive in order of ``sequence``, once each, possibly late. A batch 0 after others,
        as ``Outbox.restart`` makes it, replaces all that is known. ``covered`` are requests that
        were computed since the previous batch: the events include the KV and checkpoints that they
        stored. Raises EventsLost if preceding events are missing, or if ``epoch`` is
        not that of batch 0.
        """

    def seconds(self, start: int, end: int) -> float:
        """Return the seconds to compute ids [start, end) of a prompt."""
        unit = self.spec.unit
        return self.spec.times.seconds(start * unit, end * unit)

    def least_loaded(self) -> ReplicaId:
        """Return the replica with the fewest running requests, the oldest of equal ones."""
        return min(self.loads, key=lambda replica: self.loads[replica].num_running)

    def check(self) -> None:
        """Raise AssertionError unless every request is counted exactly once. O(requests)."""
        counted = [each for load in self.loads.values() for each in load.requests()]
        message = "a running request is counted at no replica, or at several"
        assert sorted(map(repr, counted)) == sorted(map(repr, self._where)), message
        for request, replica in self._where.items():
            assert request in self.loads[replica].requests(), f"{request!r} is at another replica"


class LeastLoaded(Router):
    """Choose the replica with the fewest running requests."""

    def choose(self, request: RouteRequest, now: float) -> Choice:
        return Choice(self.least_loaded())
