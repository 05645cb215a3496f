"""Membership of the replicas, and routing of requests: the router behind a lock, because Ray Serve
calls it from its own thread. Also the calls to a replica, and facts about it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import numpy as np

from engine.messages import Abort, EngineFacts, Question
from engine.requests.request import RequestSpec
from hybridcache.routing.outbox import EventBatch
from hybridcache.routing.protocol import ReplicaSpec, Router, RouteRequest


@dataclass(frozen=True, slots=True)
class Order:
    """The only argument of every call to a replica."""

    request_id: str = ""
    spec: RequestSpec | None = None
    """Request to place and compute, with its prompt as token ids."""
    replica: str | None = None
    """Destination, or None to send the order to the replica of the request."""
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
    """Rows of the start screen of one engine."""


FLEETS: dict[str, Fleet] = {}
"""Fleets by name. Ray Serve creates its request router itself, from a class and plain values; the
class finds its fleet here. Empty in processes other than the server."""


class Fleet:
    """The replicas of one server. All methods may be called from any thread."""

    def __init__(self) -> None:
        self.on_change: Callable[[], None] = lambda: None
        """Called, from any thread, when ``members`` changes."""
        self._router: Router | None = None
        self._lock = threading.Lock()
        self._members: list[str] = []
        self._expected: set[Hashable] = set()
        self._placed: dict[Hashable, str] = {}

    @property
    def members(self) -> tuple[str, ...]:
        """Replicas that are up, the oldest first."""
        with self._lock:
            return tuple(self._members)

    def begin(self, router: Router) -> None:
        """Place requests with ``router`` from now on."""
        with self._lock:
            self._router = router
            for replica in self._members:
                router.joined(replica, time.monotonic())

    def set_members(self, replicas: Iterable[str]) -> None:
        """Set the replicas that are up."""
        found = set(replicas)
        with self._lock:
            gone = [replica for replica in self._members if replica not in found]
            new = sorted(found.difference(self._members))
            self._members = [each for each in self._members if each in found] + new
            if self._router is not None:
                now = time.monotonic()
                for replica in gone:
                    for request in self._router.left(replica, now):
                        self._placed.pop(request, None)
                for replica in new:
                    self._router.joined(replica, now)
        if gone or new:
            self.on_change()

    def left(self, replica: str) -> None:
        """Remove one replica."""
        self.set_members(each for each in self.members if each != replica)

    def expect(self, request: str) -> None:
        """Count ``request`` as load of the replica it is placed on, until ``ended``."""
        with self._lock:
            self._expected.add(request)

    def place(self, order: Order, candidates: Iterable[str]) -> str | None:
        """Return the replica for ``order``, or None if it has to wait.

        A request keeps its replica while that is up. An order for a replica that is gone is sent to
        another one, which refuses it. A request that is not expected, because it was cancelled
        before it was placed, adds no load: no call would end it.
        """
        found = set(candidates)
        with self._lock:
            if order.replica is not None:
                return order.replica if order.replica in found else next(iter(found), None)
            where, spec = self._placed.get(order.request_id), order.spec
            if where is None:
                is_routed = spec is not None and order.request_id in self._expected
                if not is_routed or self._router is None:
                    return next((each for each in self._members if each in found), None)
                if not self._router.loads:
                    return None
                assert spec is not None
                tokens = tuple(np.asarray(spec.prompt).tolist())
                known = spec.boundaries.positions
                route = RouteRequest(order.request_id, tokens, spec.namespace, known)
                choice = self._router.route(route, time.monotonic())
                where = self._placed[order.request_id] = str(choice.replica)
            return where if where in found else None

    def prefilled(self, request: str) -> None:
        """Note that the first token of ``request`` has arrived."""
        with self._lock:
            if self._router is not None:
                self._router.prefilled(request, time.monotonic())

    def ended(self, request: str) -> None:
        """Note that ``request`` has ended or starts again."""
        with self._lock:
            self._expected.discard(request)
            self._placed.pop(request, None)
            if self._router is not None:
                self._router.ended(request, time.monotonic())

    def on_events(self, replica: str, batch: EventBatch) -> None:
        """Apply a batch of events of ``replica``. Raises EventsLost if it is not the next batch."""
        with self._lock:
            if self._router is not None:
                self._router.on_events(replica, *batch)
