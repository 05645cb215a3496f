"""Who is there and where requests go: the router behind a lock, for Ray Serve asks in a thread of
its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterable

from engine.plugins.replicas.replica_output import Order
from hybridcache.routing.outbox import EventBatch
from hybridcache.routing.protocol import Router

FLEETS: dict[str, Fleet] = {}
"""By name: Ray Serve makes its request router itself, from a class and plain values, and so the
class finds here what it serves. A process that is no server has none."""


class Fleet:
    """The replicas of one server. All verbs from any thread."""

    def __init__(self, make: Callable[[], Router], on_change: Callable[[], None]) -> None:
        """``on_change`` is called, from any thread, when ``members`` are others."""
        self._make, self._on_change = make, on_change
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

    def begin(self) -> None:
        """The router can be made: the replicas have said what they are."""
        with self._lock:
            self._router = self._make()
            for replica in self._members:
                self._router.joined(replica, time.monotonic())

    def set_members(self, replicas: Iterable[str]) -> None:
        """These are up, no others."""
        found = set(replicas)
        with self._lock:
            gone = [replica for replica in self._members if replica not in found]
            new = sorted(found.difference(self._members))
            self._members = [each for each in self._members if each in found] + new
            now = time.monotonic()
            for replica in gone if self._router is not None else ():
                assert self._router is not None
                for request in self._router.left(replica, now):
                    self._placed.pop(request, None)
            for replica in new if self._router is not None else ():
                assert self._router is not None
                self._router.joined(replica, now)
        if gone or new:
            self._on_change()

    def left(self, replica: str) -> None:
        """One is gone."""
        self.set_members(each for each in self.members if each != replica)

    def expect(self, request: str) -> None:
        """Count ``request`` as the load of the replica it is placed on, until ``ended``."""
        with self._lock:
            self._expected.add(request)

    def place(self, order: Order, candidates: Iterable[str]) -> str | None:
        """Choose the replica for ``order``; None if it has to wait.

        The same request gets the same replica again, as long as that is up. An order for a replica
        that is gone gets another one, which refuses it. A request that is not expected, since it
        was cancelled before Ray Serve came to place it, leaves no load: nobody would end it.
        """
        found = set(candidates)
        with self._lock:
            if order.replica is not None:
                return order.replica if order.replica in found else next(iter(found), None)
            is_routed = order.route is not None and order.request_id in self._expected
            if not is_routed or self._router is None:
                return next((each for each in self._members if each in found), None)
            where = self._placed.get(order.request_id)
            if where is None and self._router.loads:
                assert order.route is not None
                choice = self._router.route(order.route, time.monotonic())
                where = self._placed[order.request_id] = str(choice.replica)
            return where if where in found else None

    def prefilled(self, request: str) -> None:
        """Its first token has come."""
        with self._lock:
            if self._router is not None:
                self._router.prefilled(request, time.monotonic())

    def ended(self, request: str) -> None:
        """It is over, or begins anew."""
        with self._lock:
            self._expected.discard(request)
            self._placed.pop(request, None)
            if self._router is not None:
                self._router.ended(request, time.monotonic())

    def on_events(self, replica: str, batch: EventBatch) -> None:
        """EventsLost: it is not the batch that is due."""
        with self._lock:
            if self._router is not None:
                self._router.on_events(replica, *batch)
