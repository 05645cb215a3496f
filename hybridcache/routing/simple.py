"""Routers that know nothing of caches: in turn, the least loaded, the session's own."""

from __future__ import annotations

from hybridcache.routing.hashing import rendezvous
from hybridcache.routing.protocol import Choice, ReplicaId, ReplicaSpec, Router, RouteRequest


class RoundRobin(Router):
    """Each replica in turn."""

    def __init__(self, spec: ReplicaSpec) -> None:
        super().__init__(spec)
        self._turn = 0

    def choose(self, request: RouteRequest, now: float) -> Choice:
        replicas: list[ReplicaId] = list(self.loads)
        self._turn += 1
        return Choice(replicas[self._turn % len(replicas)])


class LeastLoaded(Router):
    """The replica with the fewest running requests."""

    def choose(self, request: RouteRequest, now: float) -> Choice:
        return Choice(self.least_loaded())


class Sticky(Router):
    """A session stays where consistent hashing puts it, whatever the load; a request without a
    session is one of its own."""

    def choose(self, request: RouteRequest, now: float) -> Choice:
        session = request.id if request.session is None else request.session
        return Choice(rendezvous(repr((request.namespace, session)).encode(), self.loads))
