"""Routers that know what each replica holds, from its events: by its KV, or by what of it can be
resumed."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import ClassVar

from hybridcache.export.events import Event
from hybridcache.export.mirror import Mirror
from hybridcache.routing.hashing import rendezvous
from hybridcache.routing.protocol import Choice, ReplicaId, ReplicaSpec, Router, RouteRequest


class MirrorRouter(Router):
    """Keeps a mirror of each replica's cache: as many tokens in all as the replicas hold."""

    follows_events: ClassVar[bool] = True

    def __init__(self, spec: ReplicaSpec) -> None:
        super().__init__(spec)
        self.mirrors: dict[ReplicaId, Mirror] = {}

    def joined(self, replica: ReplicaId, now: float) -> None:
        super().joined(replica, now)
        self.mirrors[replica] = self._empty_mirror()

    def _empty_mirror(self) -> Mirror:
        return Mirror(self.spec.page_size, None if self.spec.stateful else self.spec.grid)

    def left(self, replica: ReplicaId, now: float) -> tuple[object, ...]:
        self.mirrors.pop(replica, None)
        return super().left(replica, now)

    def on_events(self, replica: ReplicaId, sequence: int, events: Iterable[Event]) -> None:
        """Batch 0 begins anew: a replica sends it first, and again when it was asked to repeat what
        it no longer has. A replica that has left is not listened to."""
        if replica not in self.mirrors:
            return
        if sequence == 0:
            self.mirrors[replica] = self._empty_mirror()
        self.mirrors[replica].apply_batch(sequence, events)

    def check(self) -> None:
        super().check()
        assert self.mirrors.keys() == self.loads.keys()
        for mirror in self.mirrors.values():
            segments = mirror.segments()
            assert mirror.num_tokens == sum(len(segment[4]) for segment in segments)
            assert mirror.num_checkpoints == sum(segment[5] for segment in segments)


class KVScores(MirrorRouter):
    """llm-d's endpoint picker with the precise scorer: 3 x the share of the prompt whose KV is
    there, 2 x how short the queue is, 2 x how empty the KV cache is, each from 0 to 1; of equal
    ones one by lot."""

    def __init__(
        self, spec: ReplicaSpec, *, prefix: float = 3.0, queue: float = 2.0, free: float = 2.0
    ) -> None:
        super().__init__(spec)
        self._weights = prefix, queue, free
        self._lots = random.Random(spec.seed)

    def choose(self, request: RouteRequest, now: float) -> Choice:
        waiting = [load.num_waiting for load in self.loads.values()]
        most, span = max(waiting), max(waiting) - min(waiting)
        best: list[Choice] = []
        best_score = float("-inf")
        for replica, load in self.loads.items():
            mirror = self.mirrors[replica]
            kv_len = mirror.match(request.tokens, request.namespace).kv_len
            share = kv_len / max(len(request.tokens), 1)
            shortness = (most - load.num_waiting) / span if span else 1.0
            used = mirror.num_tokens / self.spec.num_kv_tokens if self.spec.num_kv_tokens else 0.0
            parts = share, shortness, 1.0 - min(used, 1.0)
            score = sum(w * part for w, part in zip(self._weights, parts, strict=True))
            if score > best_score:
                best, best_score = [], score
            if score == best_score:
                best.append(Choice(replica, min(kv_len, max(len(request.tokens) - 1, 0))))
        return self._lots.choice(best)


class CheckpointSeconds(MirrorRouter):
    """The replica where the first token is due soonest: seconds until it has done what it has, and
    of the prefill from the deepest checkpoint that it can resume. A token of depth counts what its
    prefill takes, a second of queue a second; there is nothing to set.

    Where several are equal, as when nobody has seen the prompt, consistent hashing of the branch
    (the tokens that follow what the fleet can resume) chooses: prompts that will share it meet
    before any event says so. O(replicas x tokens that they hold of the prompt).
    """

    def depth(self, request: RouteRequest, replica: ReplicaId) -> int:
        """Ids of the prompt that need not be computed on ``replica``."""
        return self.mirrors[replica].match(request.tokens, request.namespace).cached_len

    def choose(self, request: RouteRequest, now: float) -> Choice:
        num_ids = len(request.tokens)
        depths = {replica: self.depth(request, replica) for replica in self.loads}
        due = {
            replica: load.wait_s(now) + self.seconds(depths[replica], num_ids)
            for replica, load in self.loads.items()
        }
        soonest = min(due.values())
        equal = [replica for replica, seconds in due.items() if seconds <= soonest]
        chosen = rendezvous(self._branch(request, max(depths.values())), equal)
        return Choice(chosen, depths[chosen])

    def _branch(self, request: RouteRequest, depth: int) -> bytes:
        """What names the branch that leaves the known at ``depth``: its tokens up to the next grid
        position but one, the namespace with them."""
        end = depth + self.spec.grid
        return repr((request.namespace, depth, request.tokens[depth:end])).encode()


class KVSeconds(CheckpointSeconds):
    """The same rule believing in KV: what it promises where no state is, it does not get. A
    control."""

    def depth(self, request: RouteRequest, replica: ReplicaId) -> int:
        found = self.mirrors[replica].match(request.tokens, request.namespace)
        return min(found.kv_len, max(len(request.tokens) - 1, 0))
