"""Simulated caches: the project's own behind leases, or a rebuilt peer, described by one small
config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hybridcache.allocators.moves import DEVICE, DISK, HOST
from hybridcache.api import Losses
from hybridcache.cache import HybridRadixCache
from hybridcache.config import GRID, CacheConfig, build_prefix_cache
from hybridcache.geometry.exchange import DISK_BYTES_PER_S, PCIE_BYTES_PER_S, Exchange
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.times import PrefillTimes, Roofline
from hybridcache.geometry.units import GIB, format_bytes
from hybridcache.lab.baselines import (
    BASELINES,
    HOST_TIERS,
    BaselineConfig,
    PeerSession,
    build_baseline,
)
from hybridcache.lab.trace import TraceRequest
from hybridcache.lab.traces.frame import LONGEST
from hybridcache.lease import Lease, LeaseRequest
from hybridcache.policies.eviction.priority_classes import has_priority_classes
from hybridcache.policies.placement.rules import Placement
from hybridcache.policies.protocol import EvictionPolicy, PlacementPolicy, raise_failure
from hybridcache.policies.registry import (
    DEFAULT_EVICTION,
    DEFAULT_PLACEMENT,
    in_units,
    make_eviction,
    parse_placement,
)
from hybridcache.policies.user import OwnPolicy

MEMORIES = ("arena", "budget", "pools")
"""Words for ``RunConfig.memory``."""


@dataclass(frozen=True, slots=True)
class EngineSteps:
    """Take memory in the pieces in which the engine takes it, rather than a prompt or an answer at
    once.

    Makes a replay in turn equal to the engine's, eviction for eviction; costs a third of the speed
    and moves hit rates by next to nothing.
    """

    token_budget: int = 1024
    """Prompt tokens a step."""
    tile: int = 64
    """Chunks end on its multiples, or with the prompt."""
    decode_piece: int = 32
    """Rows taken ahead while decoding."""


@dataclass(frozen=True, slots=True)
class RunConfig:
    """One cell of a sweep: cache, memory and model. Sizes are in tokens and bytes, for any unit of
    the trace."""

    geometry: ModelGeometry
    budget_bytes: int | None = None
    """Bytes for KV and states together, divided as ``memory`` states; None for two pools of
    ``num_kv_tokens`` and ``num_slots``."""
    num_kv_tokens: int = 0
    num_slots: int = 0
    memory: str = "arena"
    """Division of ``budget_bytes``: ``arena``, as in the engine; ``budget``, an ideal that only
    counts bytes; or ``pools``, two, of which ``kv_share`` is for KV."""
    kv_share: float | None = None
    policy: str | OwnPolicy = DEFAULT_EVICTION
    """Eviction policy: a name, ``module:Class``, or an object that makes one."""
    checkpoints: str | OwnPolicy = DEFAULT_PLACEMENT
    """Placement: words with commas between, numbers in tokens, or ``module:Class``; or your own."""
    baseline: str | None = None
    """A rebuilt peer instead of the project's own cache; ``policy`` and ``checkpoints`` then mean
    nothing."""
    page_size: int = 1
    grid: int = GRID
    dead_first: bool = True
    demote_superseded: bool = True
    steps: EngineSteps | None = None
    """Tokens computed at once, as in the engine, for traces of single tokens. None computes a
    prompt as one piece and its answer as another."""
    host_bytes: int = 0
    """Bytes of host memory below the device, or 0."""
    disk_bytes: int = 0
    host_bytes_per_s: float = PCIE_BYTES_PER_S
    """Bytes per second from host memory to one device. The devices of a roofline share the bytes as
    they share the work, each with its own link."""
    disk_bytes_per_s: float = DISK_BYTES_PER_S
    """From disk to all devices together."""

    def __post_init__(self) -> None:
        if self.page_size < 1 or self.grid < 1:
            raise ValueError(f"page_size {self.page_size} and grid {self.grid} must be at least 1")
        if self.grid > LONGEST:
            raise ValueError(
                f"grid {self.grid}: no prompt is longer than {LONGEST} tokens, so none would have "
                "a checkpoint"
            )
        if self.memory not in MEMORIES:
            raise ValueError(f"memory {self.memory!r} is none of {', '.join(MEMORIES)}")
        if self.kv_share is None and self.memory == "pools":
            raise ValueError("memory 'pools' has no share for KV: give kv_share between 0 and 1")
        if self.kv_share is not None and self.memory != "pools":
            raise ValueError(
                f"kv_share {self.kv_share} has no meaning with memory {self.memory!r}: "
                "use memory 'pools', or leave it out"
            )
        if self.kv_share is not None and not 0 <= self.kv_share <= 1:
            raise ValueError(f"kv_share {self.kv_share} must lie in 0..1")

    @property
    def label(self) -> str:
        """Name in tables and figures."""
        name = str(self.policy)
        if self.baseline is not None:
            name = f"{self.baseline} (rebuilt)"
        elif self.checkpoints != DEFAULT_PLACEMENT:
            name = f"{name} @ {self.checkpoints}"
        for word, size in ((HOST, self.host_bytes), (DISK, self.disk_bytes)):
            if size:
                name = f"{name} + {size / GIB:.3g} GiB {word}"
        if self.baseline is not None or self.budget_bytes is None or self.memory == "arena":
            return name
        if self.kv_share is None:
            return f"{name} ({self.memory})"
        return f"{name} ({self.memory} {self.kv_share:.0%} KV)"

    @property
    def pools(self) -> tuple[int, int]:
        """Return (KV tokens, slots) of two pools, rounded down."""
        if self.budget_bytes is None:
            return self.num_kv_tokens, self.num_slots
        geometry, share = self.geometry, self.kv_share or 0.0
        num_slots = 0
        if geometry.num_linear_layers:
            num_slots = int((1 - share) * self.budget_bytes) // geometry.state_bytes
        return int(share * self.budget_bytes) // geometry.kv_bytes_per_token, num_slots

    def cache_config(self, unit: int) -> CacheConfig:
        """Return the cache in units of the trace: a row holds ``unit`` tokens, and the grid is
        at least one unit. ValueError for a page or a grid that is neither whole units nor a part
        of one."""
        geometry = self.geometry
        for name, size in (("page_size", self.page_size), ("grid", self.grid)):
            if size % unit and unit % size:
                raise ValueError(
                    f"{name} {size} must divide the trace's unit ({unit} tokens), or be a multiple "
                    "of it"
                )
        _check_tiers(self, unit)
        in_pools = self.budget_bytes is None or self.memory == "pools"
        num_kv_tokens, num_slots = self.pools if in_pools else (0, 0)
        return CacheConfig(
            prefix_cache="hybrid" if geometry.num_linear_layers else "radix",
            total_bytes=None if in_pools else self.budget_bytes,
            memory="budget" if in_pools else self.memory,
            num_kv_tokens=num_kv_tokens // unit,
            num_slots=num_slots,
            kv_bytes_per_token=geometry.kv_bytes_per_token * unit,
            state_bytes=max(geometry.state_bytes, 1),
            page_size=max(1, self.page_size // unit),
            grid=max(1, self.grid // unit),
            eviction=self.policy,
            dead_first=self.dead_first,
            demote_superseded=self.demote_superseded,
            host_bytes=self.host_bytes,
            disk_bytes=self.disk_bytes,
        )

    def exchange(self, unit: int, times: PrefillTimes) -> Exchange | None:
        """Return the rule that compares seconds of copies with seconds of prefill, for lengths in
        units. None if there is nothing below the device."""
        if not self.host_bytes and not self.disk_bytes:
            return None
        num_links = times.devices if isinstance(times, Roofline) else 1
        rates = {HOST: num_links * self.host_bytes_per_s, DISK: self.disk_bytes_per_s}
        return Exchange(times, rates, unit=unit)

    def placement(self, unit: int) -> Placement:
        """Return the placement rules, their numbers in units."""
        words = self.checkpoints
        return parse_placement(in_units(words, unit) if isinstance(words, str) else words)

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
            host_bytes=self.host_bytes,
            token_flops=geometry.flops_per_token,
            pair_flops=geometry.attention_flops_per_pair,
        )


class Served(Protocol):
    """One request that the cache serves, from its match to its release."""

    cached_len: int
    """Prompt ids reused."""
    losses: Losses | None
    """Why not more; None where the target does not say."""
    missed_len: int | None
    """Prompt ids that could have been reused, had a checkpoint not been evicted; 0 where there was
    none, None where the target does not say."""
    copy_s: float
    """Seconds of copies from lower tiers that this request waited for."""

    def prefilled(self) -> None:
        """Publish the prompt, which is computed."""
        ...

    def finish(self) -> None:
        """Publish the answer, which is decoded, and release all memory."""
        ...


class Target(Protocol):
    """A cache that requests are served with."""

    priority_classes: bool | None
    """True if unreachable KV and superseded checkpoints are evicted before all other items; None
    for a peer."""

    def begin(self, request: TraceRequest) -> Served | None:
        """Match, and take memory for the prompt and its checkpoints. Returns None, and holds
        nothing, if running requests leave too little memory."""
        ...

    def counters(self) -> dict[str, int]:
        """Return the counters of the cache, in ids and slots."""
        ...


def check_words(config: RunConfig) -> None:
    """Raise ValueError for a policy, placement or baseline that does not exist, and for a peer
    without states to keep, before anything runs."""
    if config.baseline is None:
        make_eviction(config.policy)
        parse_placement(config.checkpoints)
    elif config.baseline not in BASELINES:
        raise ValueError(f"no baseline {config.baseline!r}; known: {', '.join(BASELINES)}")
    elif config.disk_bytes or (config.host_bytes and config.baseline not in HOST_TIERS):
        raise ValueError(f"baseline {config.baseline} is not rebuilt with this tier below it")
    elif not config.geometry.num_linear_layers:
        raise ValueError(
            f"baseline {config.baseline}: {config.geometry.name} has no linear layers, and peers "
            "are rebuilt for hybrid models only; compare policies for this model"
        )


def _check_tiers(config: RunConfig, unit: int) -> None:
    """Raise ValueError for a tier below the device that can hold nothing."""
    geometry = config.geometry
    least = geometry.state_bytes + max(config.page_size, unit) * geometry.kv_bytes_per_token
    for word, num_bytes in ((HOST, config.host_bytes), (DISK, config.disk_bytes)):
        if 0 < num_bytes < least:
            raise ValueError(
                f"{word}_gib {num_bytes / GIB:.3g} is too little for a single state with a page of "
                f"KV, which take {format_bytes(least)}: give more, or 0"
            )


def build_target(config: RunConfig, unit: int, times: PrefillTimes | None = None) -> Target:
    """Build an empty target. ``times`` are the prefill times that copies are compared with; a
    roofline if None."""
    exchange = config.exchange(unit, times or Roofline.fitting(config.geometry))
    if config.baseline is not None:
        return BaselineTarget(config.baseline, config.baseline_config(unit), exchange)
    cache = build_prefix_cache(config.cache_config(unit))
    stateful = bool(config.geometry.num_linear_layers)
    own_slot = None if config.geometry.checkpoint_bytes is None else 0
    placement = config.placement(unit)
    return LeaseTarget(cache, placement, stateful, unit, config.steps, own_slot, exchange)


class LeaseTarget:
    """The project's own cache, driven through leases exactly as the engine drives it."""

    def __init__(
        self,
        cache: HybridRadixCache,
        placement: PlacementPolicy,
        stateful: bool = True,
        unit: int = 1,
        steps: EngineSteps | None = None,
        own_slot: int | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        """Any number is valid for ``own_slot`` if running states are outside the cache's memory."""
        self.cache = cache
        self.exchange = exchange
        self.placement = placement
        self.steps = steps
        self.num_exports = 0
        self.uncomputed = 1 if unit == 1 else 0
        """Tokens at an answer's end that have no KV: the last sampled token is never computed; in
        units of many tokens it is within the last one."""
        self._stateful, self._own_slot = stateful, own_slot
        self.now_s = 0.0
        """Timestamp of the present request: the clock of policies in replays."""
        policy: EvictionPolicy | None = getattr(cache, "policy", None)
        if policy is not None:
            policy.set_clock(lambda: self.now_s)
        self.priority_classes: bool | None = has_priority_classes(getattr(cache, "policy", None))

    def begin(self, request: TraceRequest) -> Served | None:
        self.now_s = request.timestamp_s
        if self._stateful and self._own_slot is None and not self.cache.has_slots:
            return None  # a pool of states that is smaller than one
        asked = LeaseRequest(
            request.tokens,
            request.namespace,
            request.boundaries,
            stateful=self._stateful,
            answer_survives=request.answer_survives,
            own_slot=self._own_slot,
        )
        before = {} if self.exchange is None else self._fetched_bytes()
        lease = Lease.begin(self.cache, self.placement, asked, self.exchange)
        if lease is None:
            return None
        served = _LeasedRequest(self, lease, request)
        if self.exchange is not None:
            after = self._fetched_bytes()
            copied = {word: after[word] - before[word] for word in after}
            served.copy_s = self.exchange.copy_seconds(copied)
        if not served.claim(lease.cached_len):
            lease.abort()
            return None
        return served

    def _fetched_bytes(self) -> dict[str, int]:
        """Return the bytes copied to the device so far, by tier."""
        lower = self.cache.offload
        if lower is None:
            return {}
        rows = lower.copied_rows
        return {word: rows.get((word, DEVICE), 0) * lower.row_bytes for word in lower.names}

    def counters(self) -> dict[str, int]:
        """See ``Target``. Raises the failure of a user's policy in the last request."""
        policy: EvictionPolicy | None = getattr(self.cache, "policy", None)
        raise_failure(None if policy is None else policy.failure)
        lower, copied = self.cache.offload, {}
        if lower is not None:
            copied = {
                f"{src}_to_{dst}_bytes": rows * lower.row_bytes
                for (src, dst), rows in lower.copied_rows.items()
            }
        arena = self.cache.arena
        moved = {}
        if arena is not None:
            moved = {"moved_slabs": arena.num_moves, "moved_tokens": arena.num_moved_rows}
        return self.cache.stats.as_dict() | {"checkpoint_copies": self.num_exports} | moved | copied


class _LeasedRequest:
    __slots__ = (
        "_end",
        "_lease",
        "_request",
        "_target",
        "cached_len",
        "copy_s",
        "losses",
        "missed_len",
    )

    def __init__(self, target: LeaseTarget, lease: Lease, request: TraceRequest) -> None:
        self._target, self._lease, self._request = target, lease, request
        self.cached_len = self._end = lease.cached_len
        self.losses: Losses | None = lease.losses
        self.missed_len: int | None = lease.cached_len + lease.match.missed_tokens
        self.copy_s = 0.0

    def claim(self, start: int) -> bool:
        """Take memory for the piece of the prompt that begins at ``start``. Returns False if it is
        refused."""
        steps, end = self._target.steps, len(self._request.tokens)
        if steps is not None and start + steps.token_budget < end:
            end = (start + steps.token_budget) // steps.tile * steps.tile
        if not self._lease.extend(end):
            return False
        self._target.num_exports += len(self._lease.take_checkpoint_slots(start, end))
        self._target.cache.take_step().done()  # There are no tensors.
        self._end = end
        return True

    def prefilled(self) -> None:
        tokens = self._request.tokens
        self._lease.publish(tokens, self._end)
        while self._end < len(tokens) and self.claim(self._end):
            self._lease.publish(tokens, self._end)

    def finish(self) -> None:
        lease, target = self._lease, self._target
        tokens, output = self._request.tokens, self._request.output
        num_ids = len(tokens)
        computed_len = num_ids + len(output) - target.uncomputed
        stop_reason = "session_end" if self._request.session_end else self._request.stop_reason
        if self._end < num_ids or computed_len <= num_ids:
            lease.finish(tokens, self._end, stop_reason=stop_reason)
            return
        if target.steps is None:
            decoded_len = computed_len if lease.extend(computed_len) else num_ids
            if decoded_len > num_ids:
                target.num_exports += len(lease.take_checkpoint_slots(num_ids, decoded_len))
        else:
            decoded_len = self._decode(computed_len, target.steps)
        target.cache.take_step().done()
        everything = np.concatenate((tokens, output))
        lease.finish(everything, decoded_len, stop_reason=stop_reason)

    def _decode(self, computed_len: int, steps: EngineSteps) -> int:
        """Decode step by step as the engine does, without the steps that touch no memory. Returns
        the computed length."""
        lease, grid = self._lease, self._target.cache.grid
        max_len = len(self._request.tokens) + len(self._request.output)
        at = len(self._request.tokens)
        while at < computed_len:
            rows = lease.extended_len
            following = min(
                rows + 1 if rows > at else at + 1, at // grid * grid + grid, computed_len
            )
            if following > rows:
                ahead = max(following, min(rows + steps.decode_piece, max_len))
                if not (lease.extend(ahead) or lease.extend(following)):
                    return at
            self._target.num_exports += len(lease.take_checkpoint_slots(following - 1, following))
            at = following
        return at


# --- Rebuilt competitors ------------------------------------------------------------------------


class BaselineTarget:
    """A rebuilt peer. ``exchange``: cost of its copies from host memory; None if it has none."""

    priority_classes: bool | None = None

    def __init__(self, word: str, config: BaselineConfig, exchange: Exchange | None = None) -> None:
        self.baseline = build_baseline(word, config)
        self.exchange = exchange
        self.num_chunks = self.fetched_bytes = 0

    def begin(self, request: TraceRequest) -> PeerRequest | None:
        session = self.baseline.begin(request.tokens, request.namespace)
        if session is None:
            return None
        self.num_chunks += session.num_chunks
        served = PeerRequest(session, request)
        if self.exchange is not None:
            self.fetched_bytes += session.fetched_bytes
            served.copy_s = self.exchange.copy_seconds({HOST: session.fetched_bytes})
        return served

    def counters(self) -> dict[str, int]:
        found = {"prefill_chunks": self.num_chunks}
        # Peers without pages reuse single tokens.
        found["page_tokens"] = getattr(self.baseline, "page_tokens", 1)
        if self.exchange is not None:
            found[f"{DEVICE}_to_{HOST}_bytes"] = self.baseline.spilled_bytes
            found[f"{HOST}_to_{DEVICE}_bytes"] = self.fetched_bytes
        return found


class PeerRequest:
    """One request of a peer, as a ``Served``."""

    __slots__ = ("_request", "_session", "cached_len", "copy_s", "losses", "missed_len")

    def __init__(self, session: PeerSession, request: TraceRequest) -> None:
        self._session, self._request = session, request
        self.cached_len = session.cached_len
        self.losses: Losses | None = None
        self.missed_len: int | None = None
        self.copy_s = 0.0

    def prefilled(self) -> None:
        """Do nothing: peers publish when they finish."""

    def finish(self) -> None:
        self._session.finish(self._request.output)
