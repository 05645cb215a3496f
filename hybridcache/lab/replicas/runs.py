"""Fleets over one trace: every router at every size and delay, resumable as sweeps are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

from hybridcache.geometry.times import PrefillTimes
from hybridcache.lab.replicas.fleet import FleetConfig, Span, times_of
from hybridcache.lab.replicas.result import FleetResult, summarise_fleet
from hybridcache.lab.replicas.serving import serve_fleet
from hybridcache.lab.simulation.grid import Place, run_grid
from hybridcache.lab.simulation.own_code import source_of
from hybridcache.lab.simulation.sizes import budget_bytes
from hybridcache.lab.simulation.sweep import identity_of
from hybridcache.lab.simulation.target import LeaseTarget, RunConfig, build_target, check_words
from hybridcache.lab.trace import Trace
from hybridcache.policies.registry import split_specs
from hybridcache.routing.protocol import ReplicaSpec
from hybridcache.routing.registry import find_router


@dataclass(frozen=True, slots=True)
class FleetJob:
    """One cell."""

    config: RunConfig
    """Memory of one replica, in bytes."""
    fleet: FleetConfig
    times: PrefillTimes

    def key(self, trace_identity: bytes) -> str:
        """Return the key of this run in a results file: a hash of its settings, and of the source
        of the user's own policies."""
        own = ""
        for policy in (self.config.policy, self.config.checkpoints, self.fleet.router):
            if not isinstance(policy, str):
                raise ValueError(f"{policy}: name the policy as in 'mine:Policy', or keep no runs")
            own += "".join(map(source_of, split_specs(policy)))
        text = repr((self.config, self.fleet, self.times)) + own
        return hashlib.sha256(text.encode() + trace_identity).hexdigest()[:16]


def check_fleet(config: RunConfig, fleet: FleetConfig) -> None:
    """Raise ValueError, with one sentence, if the job cannot be run."""
    if config.baseline is not None:
        raise ValueError(
            f"baseline {config.baseline}: rebuilt peers publish no events for routers: leave it "
            "out for a fleet"
        )
    check_words(config)
    find_router(fleet.router)


def run_fleet(trace: Trace, job: FleetJob) -> FleetResult:
    """Run one cell over a trace, which is best held in memory (``Trace.kept``)."""
    config, fleet, unit = job.config, job.fleet, trace.unit
    span = Span.of(trace, unit, config.geometry)
    times = times_of(fleet, span, config.geometry, job.times)
    cache = config.cache_config(unit)
    stateful = bool(config.geometry.num_linear_layers)
    spec = ReplicaSpec(
        times,
        unit,
        cache.page_size,
        cache.grid,
        cache.kv_bytes_per_token,
        config.geometry.state_bytes if stateful else 0,
        config.budget_bytes,
        stateful,
        config.placement(unit),
    )
    make = cast(Callable[[], LeaseTarget], partial(build_target, config, unit))
    log = serve_fleet(make, trace.in_order(), unit, fleet, times, span, spec)
    return summarise_fleet(config, fleet, log, times, trace.full_name)


def run_fleets(
    trace: Trace,
    jobs: Sequence[FleetJob],
    *,
    place: Place | None = None,
    resume_from: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[FleetResult]:
    """Return the results in the order of ``jobs``; see ``run_grid``. ValueError, before anything
    runs, for an invalid cell."""
    for job in jobs:
        check_fleet(job.config, job.fleet)
    identity = identity_of(trace) if resume_from else b""
    keys = [job.key(identity) for job in jobs] if resume_from else []
    return run_grid(
        trace,
        jobs,
        run_fleet,
        keys=keys,
        read=FleetResult.from_record,
        write=FleetResult.as_record,
        place=place or Place(),
        resume_from=resume_from,
        progress=progress,
    )


def fleet_jobs(
    config: RunConfig,
    fleet: FleetConfig,
    times: PrefillTimes,
    routers: Sequence[str],
    gib: Sequence[float],
) -> list[FleetJob]:
    """Return a job for every router at every size (of one replica, in GiB)."""
    return [
        FleetJob(
            replace(config, budget_bytes=budget_bytes(size)),
            replace(fleet, router=router),
            times,
        )
        for router in routers
        for size in gib
    ]
