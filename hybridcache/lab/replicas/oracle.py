"""The router that no fleet can have: it looks into every cache and every queue at the moment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hybridcache.api import PrefixCache
from hybridcache.export.mirror import MirrorMatch
from hybridcache.routing.precise import CheckpointSeconds
from hybridcache.routing.protocol import ReplicaId, ReplicaSpec, RouteRequest


@dataclass(frozen=True, slots=True)
class Truth:
    """View of the replicas that the oracle reads."""

    cache: Callable[[ReplicaId], PrefixCache]
    wait_s: Callable[[ReplicaId, float], float]


class Oracle(CheckpointSeconds):
    """Router with the rule of ``CheckpointSeconds`` on the true state of the replicas, instead of
    their events. The cost of a choice for later requests is estimated as in that rule."""

    follows_events: ClassVar[bool] = False

    def __init__(self, spec: ReplicaSpec, truth: Truth) -> None:
        super().__init__(spec)
        self._truth = truth

    def find(self, replica: ReplicaId, request: RouteRequest) -> MirrorMatch:
        tokens = np.array(request.tokens, np.int32)
        found = self._truth.cache(replica).match(tokens, request.namespace)
        return MirrorMatch(found.cached_len, found.kv_match_len)

    def wait_s(self, replica: ReplicaId, now: float) -> float:
        return self._truth.wait_s(replica, now)

    def num_held(self, replica: ReplicaId) -> int:
        return self._truth.cache(replica).cached_tokens

    def used_bytes(self, replica: ReplicaId) -> int:
        cache, spec = self._truth.cache(replica), self.spec
        return cache.cached_tokens * spec.kv_bytes + cache.num_checkpoints * spec.state_bytes
