"""Compare routers for eight replicas on twelve traces.

    python -m experiments.studies.router [--traces chat agent] [--processes 2] [--seeds 3]

The routers ignore the caches, estimate them from the routed prompts, or follow their KV or the
resumable lengths by events. Those with a name in capitals are rebuilt rules of other routers.

All replicas have the same size. The load would keep them busy all the time if every prompt were
computed cold. There are three conditions:

- little memory: a replica has a quarter of the workload's middle size
- more memory: a replica has the middle size, where one cache for all requests is short of memory
- late and failing: little memory, events 5 s late, and four failing replicas

A seed determines the trace and the failing replicas.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple

from experiments.studies import common
from experiments.tables import Column, Table
from hybridcache.lab.runs.fleet import FleetConfig, run_fleet
from hybridcache.lab.scenario import Scenario

REPLICAS = 8
LOAD = 1.0
RIVALS = ("TwoChoices", "PrefixAffinity", "BlocksAndWait", "StatesAndWait", "Blind")
RULES = (f"hybridcache.lab.rivals.routers:{name}" for name in RIVALS)
ROUTERS = ("least_loaded", "text", *RULES, "checkpoint")


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


def main() -> None:
    options = common.command_line(__doc__, *common.WORKLOADS, seeds=3).parse_args()
    names = [name for name in options.traces if common.WORKLOADS[name].is_available]
    jobs = list(product(names, CONDITIONS, range(options.seeds)))
    common.run_study("study_router", measure, jobs, table, options.processes)


def measure(job: tuple[str, Condition, int]) -> list[dict[str, Any]]:
    """Return one record per router of (trace, condition, seed)."""
    name, condition, seed = job
    workload = common.WORKLOADS[name]
    fleet = FleetConfig(
        REPLICAS, load=LOAD, delay_s=condition.delay_s, failures=condition.failures, seed=seed
    )
    cell = Scenario(
        name,
        model=workload.geometry,
        gib=float(f"{workload.middle * condition.share:.4g}"),
        grid=workload.grid,
        policy="lru",
        checkpoints=common.STATIC_PLACEMENT,
    )
    trace, place = workload.open(name, seed).kept(), {"trace": name, "condition": condition.name}
    runs = [run_fleet(trace, cell, replace(fleet, router=of)) for of in ROUTERS]
    return [place | common.rounded(run.as_record() | {"trace": name}) for run in runs]


def table(records: common.Records) -> Table:
    """Return one row per condition and router, as means over traces and seeds."""
    records = [{**one, "router": one["fleet"]["router"].split(":")[-1]} for one in records]
    rows = [
        [
            condition,
            f"`{router}`",
            100 * fmean(one["token_hit_rate"] for one in of),
            fmean(one["ttft_mean_s"] / one["cold_mean_s"] for one in of),
        ]
        for (condition, router), of in common.grouped(records, "condition", "router").items()
    ]
    columns = [Column("condition"), Column("router"), Column("token hit rate", "%")]
    return Table([*columns, Column("mean TTFT", "times a cold prefill", ".2f")], rows)


if __name__ == "__main__":
    main()
