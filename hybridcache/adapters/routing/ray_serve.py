"""Request router for Ray Serve and Ray Serve LLM that follows the KV events of vLLM replicas.

    RequestRouterConfig(request_router_class="hybridcache.adapters.routing.ray_serve:RayRouter")

Ray replaces failed replicas and scales; this class only chooses. A replica names its event sockets
in its routing statistics, as Ray Serve LLM does: ``{"kv_event_metadata": {"endpoint": ...,
"replay_endpoint": ...}}``. The prompt's ids are the keyword argument ``request_token_ids``, as
there. A request without ids goes to the replica with the fewest running requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np
import zmq
import zmq.asyncio
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from hybridcache.adapters.routing.blocks import BlockEvents
from hybridcache.adapters.routing.protocol import ReplicaSpec, RouteRequest
from hybridcache.adapters.routing.registry import find_router
from hybridcache.policies.registry import parse_placement


class Speed(NamedTuple):
    """Prefill times in proportion to the tokens."""

    tokens_per_s: float

    def seconds(self, start: int, end: int) -> float:
        return (end - start) / self.tokens_per_s


class RayRouter(RequestRouter):  # type: ignore[misc]
    """Ray Serve's interface around a ``Router``."""

    def initialize_state(
        self,
        tokens_per_s: float = 10_000.0,
        unit: int = 32,
        num_state_groups: int = 3,
        kv_bytes: int = 0,
        state_bytes: int = 0,
        capacity_bytes: int | None = None,
        router: str = "checkpoint",
        checkpoints: str = "branch,end",
    ) -> None:
        """Read ``request_router_kwargs``: the prefill speed of a replica, its
        ``--prefix-match-unit``, its cache groups with states (0 for attention-only models), bytes
        of one token's KV and of one state, the memory of its cache, and the placement of its
        states (``--placement``): by default forks of prompts and ends of answers."""
        sizes = kv_bytes, state_bytes, capacity_bytes, num_state_groups > 0
        times, placed = Speed(tokens_per_s), parse_placement(checkpoints)
        self.router = find_router(router)(ReplicaSpec(times, 1, unit, unit, *sizes, placed))
        self._layout = unit, num_state_groups
        self._followers: dict[str, asyncio.Task[None]] = {}
        self._sequences: dict[str, int] = {}
        self._covered: dict[str, list[Hashable]] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Note which replicas are up, and follow the events of new ones."""
        super().update_replicas(replicas)
        now, found = time.monotonic(), {one.replica_id.unique_id: one for one in replicas}
        for name in self._sequences.keys() - found.keys():
            self._left(name)
        for name, replica in found.items():
            if name not in self._sequences:
                self.router.joined(name, now)
                self._sequences[name], self._covered[name] = 0, []
            sockets = replica.routing_stats.get("kv_event_metadata")
            if sockets and name not in self._followers and self.router.follows_events:
                follower = self._follow(name, sockets)
                self._followers[name] = asyncio.get_running_loop().create_task(follower)

    def on_replica_actor_died(self, replica_id: Any) -> None:
        super().on_replica_actor_died(replica_id)
        self._left(replica_id.unique_id)

    def _left(self, name: str) -> None:
        self.router.left(name, time.monotonic())
        self._sequences.pop(name, None)
        self._covered.pop(name, None)
        if (follower := self._followers.pop(name, None)) is not None:
            follower.cancel()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the chosen replica, and then the others, which Ray tries if it is full."""
        up = {one.replica_id.unique_id: one for one in candidate_replicas}
        if not up or not self.router.loads:
            return [candidate_replicas]
        chosen, now = self.router.least_loaded(), time.monotonic()
        ids = pending_request and pending_request.kwargs.get("request_token_ids")
        if pending_request and ids is not None and len(ids):
            request_id = pending_request.metadata.internal_request_id
            self.router.ended(request_id, now)  # Ray asks again if the replica was full.
            chosen = self.router.route(
                RouteRequest(request_id, np.asarray(ids, np.int32)), now
            ).replica
        first = [up[chosen]] if chosen in up else []
        return [first, [one for one in candidate_replicas if one not in first]]

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        now, name = time.monotonic(), replica_id.unique_id
        self.router.prefilled(internal_request_id, now)
        self.router.ended(internal_request_id, now)
        if name in self._covered:
            self._covered[name].append(internal_request_id)

    # --- Events -----------------------------------------------------------------------------------

    async def _follow(self, name: str, sockets: Mapping[str, str]) -> None:
        """Follow a replica's events until it leaves. Gaps are filled by replays. If the sender has
        started again, or no longer has the missing batches, the replica counts as empty."""
        context = zmq.asyncio.Context.instance()
        live, replay = context.socket(zmq.SUB), context.socket(zmq.DEALER)
        try:
            live.connect(sockets["endpoint"])
            live.subscribe(b"")
            replay.connect(sockets["replay_endpoint"])
            blocks = await self._replayed(name, replay, BlockEvents(*self._layout))
            while True:
                _, number, payload = await live.recv_multipart()
                sequence = int.from_bytes(number, "big")
                if sequence > blocks.next_sequence or blocks.is_restarted(sequence, payload):
                    blocks = await self._replayed(name, replay, blocks)
                elif sequence == blocks.next_sequence:
                    self._apply(name, blocks, payload)
        except (TimeoutError, zmq.ZMQError, KeyError, ValueError) as error:
            logging.getLogger(__name__).warning(
                "no events of replica %s are followed: %r", name, error
            )
        finally:
            live.close(linger=0)
            replay.close(linger=0)

    async def _replayed(self, name: str, replay: Any, blocks: BlockEvents) -> BlockEvents:
        """Apply the batches from the next one on, and return their follower: a new one if the
        sender no longer has the next one, or if its last known one is not the one that was read."""
        first = max(blocks.next_sequence - 1, 0)
        await replay.send_multipart([b"", first.to_bytes(8, "big")])
        batches = []
        while True:
            number, payload = (await asyncio.wait_for(replay.recv_multipart(), 5.0))[-2:]
            if not payload:  # The end of the replay.
                break
            batches.append((int.from_bytes(number, "big"), payload))
        is_known = batches and batches[0][0] == first and not blocks.is_restarted(*batches[0])
        if first and not is_known:
            self._sequences[name] = 0
            return await self._replayed(name, replay, BlockEvents(*self._layout))
        for sequence, payload in batches:
            if sequence > blocks.next_sequence:
                blocks, self._sequences[name] = BlockEvents(*self._layout, sequence), 0
            if sequence == blocks.next_sequence:
                self._apply(name, blocks, payload)
        return blocks

    def _apply(self, name: str, blocks: BlockEvents, payload: bytes) -> None:
        number, covered = self._sequences[name], tuple(self._covered[name])
        self._covered[name].clear()
        self._sequences[name] = number + 1
        self.router.on_events(name, number, blocks.read(blocks.next_sequence, payload), covered)
