"""Compare checkpoint grids of 64, 32, 16 and 1 tokens, with the default policies.

    python -m experiments.studies.grid [--seeds 10] [--points 3]

Gains are paired by seed. No kernel has a grid of 1. `docs/engine/steps.md` has the cost
of the other grids.
"""

from __future__ import annotations

from typing import Any

from experiments.studies.common import (
    WORKLOADS,
    Workload,
    arguments,
    keep,
    slim,
    workloads,
)
from hybridcache import simulate
from hybridcache.lab.intervals import interval, paired
from hybridcache.lab.report import text_table

GRIDS = (64, 32, 16, 1)
WORKLOADS.setdefault("tree-of-thoughts", Workload("tree-of-thoughts", "0.5:16:15"))
TRACES = ("tree-of-thoughts", "short", "few-shot", "branch", "chat")
POINTS = 3
Rates = list[float]


def main() -> None:
    options = arguments(__doc__, *TRACES)
    records: list[dict[str, Any]] = []
    for name in (bar := workloads(options)):
        workload = WORKLOADS[name]
        for seed in workload.seeds(options.seeds):
            bar.set_description(f"{name}, seed {seed}")
            trace = workload.open(name, options.full, seed).kept()
            for grid in GRIDS:
                found = simulate(
                    trace,
                    model=workload.geometry,
                    gib=workload.sizes(options.points or POINTS),
                    grid=grid,
                    bound=False,
                    processes=options.processes,
                )
                records += [slim(name, run, seed=seed) for run in found.runs]
    keep("study_grid", records)
    print(text_table(*table(records)))


def rates(records: list[dict[str, Any]]) -> dict[str, dict[float, dict[int, Rates]]]:
    """Return hit rates in percent by trace, size and grid, one per seed."""
    found: dict[str, dict[float, dict[int, Rates]]] = {}
    for record in sorted(records, key=lambda record: (record["gib"], record["seed"])):
        by_grid = found.setdefault(record["trace"], {}).setdefault(record["gib"], {})
        by_grid.setdefault(record["grid"], []).append(100 * record["token_hit_rate"])
    return found


def table(records: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: the hit rate with the first grid, and the gains of the others."""
    first, *others = GRIDS
    rows = [
        [name, f"{gib:.3g}", str(interval(by_grid[first]))]
        + [str(paired(by_grid[grid], by_grid[first])) for grid in others]
        for name, by_size in rates(records).items()
        for gib, by_grid in by_size.items()
    ]
    return [
        "trace",
        "GiB",
        f"grid {first}, %",
        *(f"gain of {grid}, points" for grid in others),
    ], rows


if __name__ == "__main__":
    main()
