"""What is simulated: the project's own cache behind leases, or a rebuilt peer, told apart by one small config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from hybridcache.baselines import BaselineConfig, Session, build_baseline
from hybridcache.build import CacheConfig, build_prefix_cache
from hybridcache.costs import ModelGeometry
from hybridcache.interface import Losses, PrefixCache
from hybridcache.lease import Lease, LeaseRequest
from hybridcache.lease_log import LeaseLog
from hybridcache.policies.checkpoint import NUMBERED_PLACEMENT, parse_placement
from hybridcache.policies.protocol import PlacementPolicy
from hybridcache.trace import TraceRequest

GIB = 1 << 30
DEFAULT_CHECKPOINTS = "branch,boundary,backoff,end"


@dataclass(frozen=True, slots=True)
class RunConfig:
    """One cell of a sweep: who manages how much memory for which model. Sizes are in tokens and bytes, whatever the trace's unit."""

    geometry: ModelGeometry
    budget_bytes: int | None = None
    """One budget for KV and states; None: two pools, ``num_kv_tokens`` and ``num_slots``."""
    num_kv_tokens: int = 0
    num_slots: int = 0
    policy: str = "lru"
    """Eviction: a word or ``module:Class``."""
    checkpoints: str = DEFAULT_CHECKPOINTS
    """Placement: words with commas between, numbers in tokens, or ``module:Class``."""
    baseline: str | None = None
    """A rebuilt peer instead of the project's own cache; ``policy`` and ``checkpoints`` then mean nothing."""
    page_size: int = 1
    grid: int = 64
    dead_first: bool = True
    demote_superseded: bool = True

    @property
    def label(self) -> str:
        """How tables and figures call it."""
        if self.baseline is not None:
            return self.baseline
        if self.checkpoints == DEFAULT_CHECKPOINTS:
            return self.policy
        return f"{self.policy} @ {self.checkpoints}"

    def cache_config(self, unit: int) -> CacheConfig:
        """In units of the trace: a row holds ``unit`` tokens, and the grid is at least one unit."""
        geometry = self.geometry
        return CacheConfig(
            prefix_cache="hybrid" if geometry.num_linear_layers else "radix",
            total_bytes=self.budget_bytes,
            num_kv_tokens=self.num_kv_tokens // unit,
            num_slots=self.num_slots,
            kv_bytes_per_token=geometry.kv_bytes_per_token * unit,
            state_bytes=max(geometry.state_bytes, 1),
            page_size=max(1, self.page_size // unit),
            grid=max(1, self.grid // unit),
            eviction=self.policy,
            dead_first=self.dead_first,
            demote_superseded=self.demote_superseded,
        )

    def placement(self, unit: int) -> PlacementPolicy:
        """The placement rules, their numbers in units."""
        return parse_placement(
            ",".join(_in_units(word, unit) for word in self.checkpoints.split(","))
        )

    def baseline_config(self, unit: int) -> BaselineConfig:
        geometry = self.geometry
        budget = self.budget_bytes
        if budget is None:
            budget = self.num_kv_tokens * geometry.kv_bytes_per_token
            budget += self.num_slots * geometry.state_bytes
        return BaselineConfig(
            budget_bytes=budget,
            kv_bytes_per_token=geometry.kv_bytes_per_token,
            state_bytes=geometry.state_bytes,
            num_full_layers=geometry.num_full_layers,
            num_linear_layers=geometry.num_linear_layers,
            grid=self.grid,
            unit=unit,
        )


def _in_units(word: str, unit: int) -> str:
    name, colon, number = word.strip().partition(":")
    if not colon or name not in NUMBERED_PLACEMENT or not number.isdecimal():
        return word
    return f"{name}:{max(1, int(number) // unit)}"


class Served(Protocol):
    """One request that is in the cache's hands, from its match to its release."""

    cached_len: int
    """Prompt ids reused."""
    losses: Losses | None
    """Why not more; None where the target does not say."""
    missed_len: int
    """Prompt ids that could have been reused, had a checkpoint not been evicted; 0 where there was none."""

    def prefilled(self) -> None:
        """The prompt is computed: publish it."""
        ...

    def finish(self) -> None:
        """The answer is decoded: publish it, let everything go."""
        ...


class Target(Protocol):
    """A cache that requests are served with."""

    def begin(self, request: TraceRequest) -> Served | None:
        """Match, and hold memory for the prompt and its checkpoints. None: too little memory is free of running requests;
        nothing is held."""
        ...

    def counters(self) -> dict[str, int]:
        """What it counted, in ids and slots."""
        ...


def build_target(config: RunConfig, unit: int, log: LeaseLog | None = None) -> Target:
    """A fresh, empty target. With ``log``, our own cache's leases are recorded in it."""
    if config.baseline is not None:
        return BaselineTarget(config.baseline, config.baseline_config(unit))
    cache = build_prefix_cache(config.cache_config(unit))
    return LeaseTarget(
        cache, config.placement(unit), bool(config.geometry.num_linear_layers), unit, log
    )


class LeaseTarget:
    """The project's own cache, driven through leases exactly as the engine drives it."""

    def __init__(
        self,
        cache: PrefixCache,
        placement: PlacementPolicy,
        stateful: bool = True,
        unit: int = 1,
        log: LeaseLog | None = None,
    ) -> None:
        self.cache = cache
        self.placement = placement
        self.log = log
        self.num_exports = 0
        self._stateful = stateful
        # The last sampled token is never computed; in units of many tokens it is within the last one.
        self._uncomputed = 1 if unit == 1 else 0

    def begin(self, request: TraceRequest) -> Served | None:
        asked = LeaseRequest(
            request.tokens, request.namespace, request.boundaries, stateful=self._stateful
        )
        lease = Lease.begin(self.cache, self.placement, asked)
        if lease is None:
            return None
        num_ids = len(request.tokens)
        if not lease.extend(num_ids):
            lease.abort()
            return None
        self.num_exports += len(lease.exports(lease.cached_len, num_ids))
        return _LeasedRequest(self, lease, request)

    def counters(self) -> dict[str, int]:
        return self.cache.stats.as_dict() | {"checkpoint_copies": self.num_exports}

    def computed_len(self, request: TraceRequest) -> int:
        """Ids of prompt and answer whose KV exists when the answer is complete."""
        return len(request.tokens) + max(len(request.output) - self._uncomputed, 0)


class _LeasedRequest:
    __slots__ = ("_lease", "_request", "_target", "cached_len", "losses", "missed_len")

    def __init__(self, target: LeaseTarget, lease: Lease, request: TraceRequest) -> None:
        self._target, self._lease, self._request = target, lease, request
        self.cached_len = lease.cached_len
        self.losses: Losses | None = lease.losses
        missed = lease.match.missed
        self.missed_len = missed.position if missed is not None else 0

    def prefilled(self) -> None:
        self._lease.publish(self._request.tokens, len(self._request.tokens))

    def finish(self) -> None:
        request, lease, target = self._request, self._lease, self._target
        num_ids, computed_len = len(request.tokens), target.computed_len(request)
        if computed_len == num_ids or not lease.extend(computed_len):
            lease.finish(request.tokens, num_ids)
            return
        target.num_exports += len(lease.exports(num_ids, computed_len))
        lease.finish(np.concatenate((request.tokens, request.output)), computed_len)


class BaselineTarget:
    """A rebuilt peer."""

    def __init__(self, word: str, config: BaselineConfig) -> None:
        self.baseline = build_baseline(word, config)
        self.num_chunks = 0

    def begin(self, request: TraceRequest) -> Served | None:
        session = self.baseline.begin(request.tokens, request.namespace)
        if session is None:
            return None
        self.num_chunks += session.num_chunks
        return _BaselineRequest(session, request)

    def counters(self) -> dict[str, int]:
        return {"prefill_chunks": self.num_chunks}


class _BaselineRequest:
    __slots__ = ("_request", "_session", "cached_len", "losses", "missed_len")

    def __init__(self, session: Session, request: TraceRequest) -> None:
        self._session, self._request = session, request
        self.cached_len = session.cached_len
        self.losses: Losses | None = None
        self.missed_len = 0

    def prefilled(self) -> None:
        """Peers publish when they finish."""

    def finish(self) -> None:
        self._session.finish(self._request.output)


def describe(config: RunConfig) -> dict[str, Any]:
    """What identifies a run in a results file."""
    geometry = config.geometry
    return {
        "label": config.label,
        "model": geometry.name,
        "state_dtype": geometry.state_dtype,
        "gib": None if config.budget_bytes is None else config.budget_bytes / GIB,
        "num_kv_tokens": config.num_kv_tokens or None,
        "num_slots": config.num_slots or None,
        "policy": None if config.baseline else config.policy,
        "checkpoints": None if config.baseline else config.checkpoints,
        "baseline": config.baseline,
        "page_size": config.page_size,
        "grid": config.grid,
    }
