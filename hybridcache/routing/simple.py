"""Routers that ignore caches: round robin, least loaded and sticky sessions."""

from __future__ import annotations

from hybridcache.routing.hashing import rendezvous
from hybridcache.routing.protocol import Choice, ReplicaId, ReplicaSpec, Router, RouteRequest


class RoundRobin(Router):
    """Choose each replica in turn."""

    def __init__(self, spec: ReplicaSpec) -> None:
        super().__init__(spec)
        self._turn = 0

    def choose(self, request: RouteRequest, now: float) -> Choice:
        replicas: list[ReplicaId] = list(self.loads)
        self._turn += 1
        return Choice(replicas[self._turn % len(replicas)])


class LeastLoaded(Router):
    """Choose the replica with the fewest running requests."""

    def choose(self, request: RouteRequest, now: float) -> Choice:
        return Choice(self.least_loaded())


class Sticky(Router):
    """Choose a session's replica by consistent hashing, regardless of load.

    A request without a session is treated as a session by itself.
    """

    def choose(self, request: RouteRequest, now: float) -> Choice:
        session = request.id if request.session is None else request.session
        return Choice(rendezvous(repr((request.namespace, session)).encode(), self.loads))
