"""Request router of Ray Serve that delegates to the router of the fleet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

if TYPE_CHECKING:
    from engine.plugins.replicas.fleet import Fleet


class FleetRequestRouter(RequestRouter):  # type: ignore[misc]
    """Runs in the process of the handle, which is the server."""

    def initialize_state(self, fleet: str) -> None:
        # Ray copies this module by value with all its references, so the shared fleet is found by
        # name.
        from engine.plugins.replicas.fleet import FLEETS

        self._fleet: Fleet | None = FLEETS.get(fleet)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        if self._fleet is not None:
            self._fleet.set_members(replica.replica_id.unique_id for replica in replicas)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        if self._fleet is not None:
            self._fleet.left(replica_id.unique_id)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        if pending_request is None or self._fleet is None:
            return [candidate_replicas]
        by_id: dict[str, Any] = {each.replica_id.unique_id: each for each in candidate_replicas}
        [order] = pending_request.args
        chosen = self._fleet.place(order, by_id)
        return [] if chosen is None else [[by_id[chosen]]]
