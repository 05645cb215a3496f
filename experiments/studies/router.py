"""Compare routers for eight replicas on twelve traces.

    python -m experiments.studies.router [--traces chat,agent] [--resume FOLDER] [--processes 2]
        [--seeds 0,1,2]

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
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from tqdm import tqdm

from experiments.studies.common import STATIC_PLACEMENT, WORKLOADS, keep, rounded
from hybridcache.lab.fleet import FleetConfig, FleetJob, FleetResult, run_fleet
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.simulation.grid import Place, collect_seldom, run_grid

REPLICAS = 8
LOAD = 1.0
TIED = 0.01
"""Largest difference of token hit rates that is a tie: one point."""
TTFT_TIED = 0.05
"""Largest relative difference of mean TTFTs that is a tie."""
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
    parser.add_argument(
        "--resume", type=Path, help="folder for finished runs, to continue a stopped study"
    )
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
    keep("study_router", _records(cells))
    _report(cells)


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
        read=FleetResult.from_record,
        write=FleetResult.as_record,
        place=Place(options.processes, options.ray),
        resume_from=options.resume / f"{trace}.jsonl" if options.resume else None,
        progress=show,
    )


def _records(cells: Cells) -> list[dict[str, Any]]:
    return [
        {"trace": trace, "condition": condition} | rounded(run.as_record() | {"trace": trace})
        for (trace, condition), runs in cells.items()
        for run in runs
    ]


class Figures(NamedTuple):
    """Figures of one router in one cell, over all seeds."""

    hits: float
    """Mean token hit rate."""
    ttft_s: float
    """Mean of the mean TTFTs."""
    wait: float
    """Mean TTFT as a share of a cold prefill."""
    spread: tuple[float, float]
    """Lowest and highest hit rate."""


def _figures(runs: list[FleetResult]) -> dict[str, Figures]:
    by_router: dict[str, list[FleetResult]] = {}
    for run in runs:
        by_router.setdefault(run.fleet.router, []).append(run)
    return {
        router: Figures(
            fmean(run.token_hit_rate for run in found),
            fmean(run.ttft_mean_s for run in found),
            fmean(run.ttft_mean_s / run.cold_mean_s for run in found),
            (min(run.token_hit_rate for run in found), max(run.token_hit_rate for run in found)),
        )
        for router, found in by_router.items()
    }


def _report(cells: Cells) -> None:
    """Print one line per cell with hit rates, and the cells where another router is better than
    ``checkpoint``."""
    print(f"{'':36}" + "".join(f"{router:>14}" for router in _routers(cells)))
    behind = []
    for (trace, condition), runs in cells.items():
        figures = _figures(runs)
        rates = "".join(f"{100 * one.hits:9.1f}{one.ttft_s:5.2g}" for one in figures.values())
        print(f"{trace:16}{condition:20}{rates}")
        behind += [f"{trace}, {condition}: {loss}" for loss in _lost(figures)]
    print(f"token hit rate in %, mean TTFT in s, means over seeds; {len(cells)} cells")
    print("\n".join(behind) or "checkpoint is best or tied in every cell")


def _lost(figures: dict[str, Figures]) -> list[str]:
    """Return the figures in which another router is better than ``checkpoint`` by more than a
    tie."""
    ours = figures.get("checkpoint")
    rivals = {router: found for router, found in figures.items() if router != "checkpoint"}
    if ours is None or not rivals:
        return []
    losses = []
    router, best = max(rivals.items(), key=lambda item: item[1].hits)
    if best.hits > ours.hits + TIED:
        low, high = (f"{100 * rate:.1f}" for rate in ours.spread)
        gap = f"{100 * (best.hits - ours.hits):.1f}"
        losses.append(f"{router} hits {gap} points more (checkpoint {low} to {high} %)")
    router, fastest = min(rivals.items(), key=lambda item: item[1].ttft_s)
    if fastest.ttft_s * (1 + TTFT_TIED) < ours.ttft_s:
        losses.append(f"mean TTFT of {router} is {ours.ttft_s / fastest.ttft_s:.2f}x shorter")
    return losses


def _routers(cells: Cells) -> list[str]:
    return list(_figures(next(iter(cells.values()))))


if __name__ == "__main__":
    main()
