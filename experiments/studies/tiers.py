"""Measure the gain from host memory, compared with as much memory on the device.

    python -m experiments.studies.tiers [--traces chat,agent] [--seeds 10]

Twelve traces run on a device with 4 GiB for KV and states, with and without 16 GiB of host memory,
and on a device with 20 GiB. The goal: both tiers together save at least 95 % of the seconds that
20 GiB save. Seconds saved are the prefill seconds of an engine without a cache, minus those
computed and minus the copies that requests waited for. Copies run over PCIe 5.0 (50 GB/s per
device).

This counts a copy as if the device were idle meanwhile. In fact the engine computes other requests
while it loads a prefix. Requests that exceed 4 GiB are left out, because no device of that size can
run them. Prefills share their steps, as in a busy engine, so a token costs only its arithmetic.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from experiments.studies.common import STATIC_PLACEMENT, WORKLOADS, keep, measured, rounded
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.times import Roofline
from hybridcache.geometry.units import GIB
from hybridcache.lab.intervals import interval
from hybridcache.lab.report import text_table
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.simulation.result import RunResult, summarise
from hybridcache.lab.simulation.serving import serve
from hybridcache.lab.simulation.target import build_target
from hybridcache.lab.trace import Trace

DEVICE_GIB = 4
HOST_GIB, GOAL_GIB = 16, 20
GOAL_CELL = f"device {GOAL_GIB}"
DEFAULT = "survival"
Shares = list[float]


def servable(trace: Trace, geometry: ModelGeometry) -> Trace:
    """Return the trace without requests that no device of ``DEVICE_GIB`` can run.

    Their KV and two states are larger than the device. The trace is held in memory.
    """
    room = (DEVICE_GIB * GIB - 2 * geometry.state_bytes) // geometry.kv_bytes_per_token
    sizes = (
        (request, request.num_tokens(trace.unit) + len(request.output) * trace.unit)
        for request in trace
    )
    return replace(trace, source=[request for request, size in sizes if size <= room].__iter__)


def run(trace: Trace, cell: Scenario) -> RunResult:
    """Replay the trace once, one request after the other."""
    target = build_target(cell, trace.unit)
    return summarise(cell, serve(target, trace, trace.unit, cell), target, trace.name)


def cells(base: Scenario) -> dict[str, Scenario]:
    """Return the memories by name."""
    found = {f"device {gib}": replace(base, gib=gib) for gib in (DEVICE_GIB, GOAL_GIB)}
    return found | {f"host {HOST_GIB}": replace(base, gib=DEVICE_GIB, host_gib=HOST_GIB)}


def measure(job: tuple[str, int, str]) -> list[dict[str, Any]]:
    """Return one record per cell of (trace, seed, policy)."""
    trace_name, seed, policy = job
    workload = WORKLOADS[trace_name]
    trace = servable(workload.open(trace_name, False, seed), workload.geometry)
    alone = Roofline.fitting(workload.geometry)
    base = Scenario(
        trace,
        model=workload.geometry,
        policy=policy,
        checkpoints="adaptive" if policy == DEFAULT else STATIC_PLACEMENT,
        grid=max(workload.grid, trace.unit),
        times=replace(alone, bytes_per_s=1e30, overhead_s=0.0),
    )
    records = []
    for name, cell in cells(base).items():
        result = run(trace, cell)
        records.append(
            {
                "trace": trace_name,
                "seed": seed,
                "policy": policy,
                "cell": name,
                "requests": result.requests,
                "prompt_tokens": result.prompt_tokens,
                "token_hit_rate": result.token_hit_rate,
                "seconds": result.seconds,
                "seconds_saved": result.seconds_saved,
                "copy_seconds": result.copy_seconds,
                "not_fetched": getattr(result.losses, "not_fetched", 0),
                "tier_bytes": result.tier_bytes,
                "written_bytes": (result.written_kv_bytes or 0)
                + (result.checkpoints_made or 0) * workload.geometry.state_bytes,
            }
        )
    return [rounded(record) for record in records]


def share(cells_of: dict[str, dict[str, Any]], cell: str) -> float | None:
    """Return the seconds that ``cell`` saves, relative to those of ``GOAL_CELL``. None if nothing
    can be saved."""
    whole = cells_of[GOAL_CELL]["seconds_saved"]
    total = whole + cells_of[GOAL_CELL]["seconds"]
    return cells_of[cell]["seconds_saved"] / whole if whole > 1e-3 * total else None


def shares_by_trace(records: Sequence[dict[str, Any]], policy: str, cell: str) -> dict[str, Shares]:
    """Return the seconds that ``cell`` saves relative to 20 GiB by trace, one value per seed.

    Traces are left out if nothing can be saved with some seed.
    """
    found: dict[str, dict[int, dict[str, dict[str, Any]]]] = {}
    for record in records:
        if record["policy"] == policy:
            by_seed = found.setdefault(record["trace"], {})
            by_seed.setdefault(record["seed"], {})[record["cell"]] = record
    shares = {
        name: [share(cells_of, cell) for cells_of in by_seed.values()]
        for name, by_seed in found.items()
    }
    return {
        name: [value for value in values if value is not None]
        for name, values in shares.items()
        if None not in values
    }


def over_seeds(
    records: Sequence[dict[str, Any]], policy: str = DEFAULT
) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: seconds saved relative to those of 20 GiB, in percent, per trace."""
    device, host = (
        shares_by_trace(records, policy, cell) for cell in (f"device {DEVICE_GIB}", "host 16")
    )
    rows = [
        [name, *(str(interval(shares[name]).scaled(100)) for shares in (device, host))]
        for name in device
    ]
    return ["trace", f"{DEVICE_GIB} GiB, %", f"{DEVICE_GIB} GiB and 16 GiB of host memory, %"], rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", default=",".join(WORKLOADS), help="names of WORKLOADS")
    parser.add_argument("--policy", default="survival,lru", help="evictions, separated by commas")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    names = [name for name in options.traces.split(",") if WORKLOADS[name].is_available]
    policies = options.policy.split(",")
    jobs = [
        (name, seed, policy)
        for name in names
        for seed in WORKLOADS[name].seeds(options.seeds)
        for policy in policies
    ]
    found = measured(measure, jobs, options.processes)
    records = [record for several in found for record in several]
    if names == list(WORKLOADS):
        keep("study_tiers", records)
    for policy in policies:
        print(policy, text_table(*over_seeds(records, policy)), sep="\n")


if __name__ == "__main__":
    main()
