"""Compare routers for eight replicas on twelve traces.

    python -m experiments.studies.router [--traces chat,agent] [--processes 2] [--seeds 0,1,2]

The routers ignore the caches, estimate them from the routed prompts, or follow the resumable
lengths by events.

All replicas have the same size. The load would keep them busy all the time if every prompt were
computed cold. There are three conditions:

- little memory: a replica has a quarter of the workload's middle size
- more memory: a replica has the middle size, where one cache for all requests is short of memory
- late and failing: little memory, events 5 s late, and four failing replicas

A seed determines the trace and the failing replicas.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, NamedTuple

from tqdm import tqdm

from experiments.studies.common import STATIC_PLACEMENT, WORKLOADS, keep, rounded
from hybridcache.lab.fleet import FleetConfig, FleetJob, FleetResult, run_fleet
from hybridcache.lab.report import text_table
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.simulation.grid import Place, collect_seldom, run_grid

REPLICAS = 8
LOAD = 1.0
ROUTERS = ("least_loaded", "text", "checkpoint")


class Condition(NamedTuple):
    """Memory, event delay and failures of one comparison."""

    name: str
    share: float
    """Memory of a replica relative to the workload's middle size."""
    delay_s: float = 0.0
    failures: int = 0


CONDITIONS = (
    Condition("little memory", 0.25),
    Condition("more memory", 1.0),
    Condition("late and failing", 0.25, 5.0, 4),
)
Cells = dict[tuple[str, str], list[FleetResult]]
"""Runs of each trace and condition, with all routers and seeds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", default=",".join(WORKLOADS), help="names of WORKLOADS")
    parser.add_argument("--routers", default=",".join(ROUTERS))
    parser.add_argument("--full", action="store_true", help="whole traces, not only their start")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--ray", help="address of a Ray cluster to spread the runs over")
    options = parser.parse_args()
    collect_seldom()
    traces = [trace for trace in options.traces.split(",") if WORKLOADS[trace].is_available]
    cells: Cells = {}
    with tqdm(traces, disable=None) as bar:
        for trace in bar:
            for condition in CONDITIONS:
                bar.set_description(f"{trace}, {condition.name}")
                cells[trace, condition.name] = [
                    run
                    for seed in map(int, options.seeds.split(","))
                    for run in _cell(trace, condition, seed, options, bar)
                ]
    records = _records(cells)
    keep("study_router", records)
    print(text_table(*table(records)))


def _cell(
    trace: str, condition: Condition, seed: int, options: argparse.Namespace, bar: tqdm[Any]
) -> list[FleetResult]:
    workload = WORKLOADS[trace]
    fleet = FleetConfig(
        REPLICAS, load=LOAD, delay_s=condition.delay_s, failures=condition.failures, seed=seed
    )
    cell = Scenario(
        trace,
        model=workload.geometry,
        gib=float(f"{workload.middle * condition.share:.4g}"),
        grid=workload.grid,
        policy="lru",
        checkpoints=STATIC_PLACEMENT,
    )
    jobs = [FleetJob(cell, replace(fleet, router=router)) for router in options.routers.split(",")]

    def show(done: int, total: int) -> None:
        bar.set_postfix_str(f"seed {seed}: {done} of {total}")

    return run_grid(
        workload.open(trace, options.full, seed),
        jobs,
        run_fleet,
        place=Place(options.processes, options.ray),
        progress=show,
    )


def _records(cells: Cells) -> list[dict[str, Any]]:
    return [
        {"trace": trace, "condition": condition} | rounded(run.as_record() | {"trace": trace})
        for (trace, condition), runs in cells.items()
        for run in runs
    ]


def table(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return a header and one row per condition and router, as means over traces and seeds."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in records:
        cells.setdefault((one["condition"], one["fleet"]["router"]), []).append(one)
    rows = [
        [
            condition,
            f"`{router}`",
            f"{100 * fmean(one['token_hit_rate'] for one in of):.1f}",
            f"{fmean(one['ttft_mean_s'] / one['cold_mean_s'] for one in of):.2f}",
        ]
        for (condition, router), of in cells.items()
    ]
    return ["condition", "router", "token hit rate, %", "mean TTFT, times a cold prefill"], rows


if __name__ == "__main__":
    main()
