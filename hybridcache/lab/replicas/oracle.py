"""The router that no fleet can have: it looks into every cache and every queue at the moment."""

from __future__ import annotations

from collections.abc import Callable

from hybridcache.routing.hashing import rendezvous
from hybridcache.routing.protocol import Choice, ReplicaId, ReplicaSpec, Router, RouteRequest

Look = Callable[[ReplicaId, RouteRequest], int]
"""Ids of a request's prompt that a replica could resume at this moment."""
Wait = Callable[[ReplicaId, float], float]
"""Seconds of prefill that a replica has to do, at a time."""


class Oracle(Router):
    """The replica where the first token really is due soonest. It knows no future: what a choice
    does to later requests it does not ask."""

    def __init__(self, spec: ReplicaSpec, look: Look, wait_s: Wait) -> None:
        super().__init__(spec)
        self._look, self._wait_s = look, wait_s

    def choose(self, request: RouteRequest, now: float) -> Choice:
        depths = {replica: self._look(replica, request) for replica in self.loads}
        num_ids = len(request.tokens)
        due = {
            replica: self._wait_s(replica, now) + self.seconds(depth, num_ids)
            for replica, depth in depths.items()
        }
        soonest = min(due.values())
        end = max(depths.values()) + self.spec.grid
        branch = repr((request.namespace, request.tokens[:end][-self.spec.grid :])).encode()
        chosen = rendezvous(branch, [each for each, s in due.items() if s <= soonest])
        return Choice(chosen, depths[chosen])
