"""Measure `lru@adaptive`, rebuilt systems and the upper bound on the cells of other studies.

    python -m experiments.studies.yardsticks [--seeds 5] [--processes 2]

Cells are those of ``default`` (all splits, replays and closed loops; one seed of the tuning split)
and those of ``capacity`` with seed 0. yardsticks.jsonl has a line per trace and seed: token hit
rates by name, one per size. They depend on no learned policy of this project except the placement
of `lru@adaptive`. The bound of a closed loop is that of ``common.bound_in_any_order``.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

from experiments.studies import common, default
from experiments.studies.common import BOUND, LRU_ADAPTIVE, REBUILT, YARDSTICKS
from experiments.studies.default import TraceJob
from experiments.tables import Column, Table
from hybridcache import open_trace

NAME = "yardsticks"
CAPACITY = "capacity"
SPLITS = ("evaluation", "tuning", "outside", "closed loop")

Cells = dict[tuple[str, Any, float], dict[str, float]]
"""Rates of ``YARDSTICKS`` in percent by (trace, seed, GiB)."""


def jobs_of(seeds: int) -> Iterator[TraceJob]:
    """Yield the jobs of all splits, without missing files. The path of one of ``capacity`` is the
    name of its workload."""
    for split in SPLITS:
        count = 1 if split == "tuning" else seeds
        yield from default.jobs_of(split, default.splits_file(), count)
    for name, workload in common.WORKLOADS.items():
        if workload.is_available:
            yield TraceJob(CAPACITY, name, 0, workload.sizes(), path=name)


def measure(job: TraceJob) -> list[dict[str, Any]]:
    """Return the record of one job."""
    if job.split == CAPACITY:
        workload = common.WORKLOADS[job.spec]
        trace = workload.open(job.spec).kept()
        settings: dict[str, Any] = {"model": workload.geometry, "grid": workload.grid}
    else:
        trace = open_trace(job.spec).kept()
        settings = {"model": default.splits_file()["model"]}
    rates = {
        name: common.hit_rates(trace, job.gib, name, job.rate, job.seed or 0, **settings)
        for name in (LRU_ADAPTIVE, *REBUILT, BOUND)
    }
    fields = {"split": job.split, "trace": job.label, "seed": job.seed, "gib": list(job.gib)}
    return [fields | {"token_hit_rates": common.rounded(rates)}]


def by_cell(records: common.Records, *splits: str) -> Cells:
    """Return the rates of the cells of ``splits``, those of ``default`` if none is named."""
    found = {}
    for record in records:
        if record["split"] not in (splits or SPLITS):
            continue
        rates = record["token_hit_rates"]
        best = [max(of) for of in zip(*(rates[name] for name in REBUILT), strict=True)]
        for place, gib in enumerate(record["gib"]):
            of = rates[LRU_ADAPTIVE], best, rates[BOUND]
            shown = dict(zip(YARDSTICKS, (100 * one[place] for one in of), strict=True))
            found[record["trace"], record["seed"], gib] = shown
    return found


def table(records: common.Records) -> Table:
    """Return a row per trace and size, as means over seeds."""
    cells: dict[tuple[str, float], list[dict[str, float]]] = {}
    for (trace, _, gib), rates in by_cell(records).items():
        cells.setdefault((trace, gib), []).append(rates)
    rows = [
        [trace, gib, *(fmean(of[name] for of in found) for name in YARDSTICKS)]
        for (trace, gib), found in cells.items()
    ]
    return Table([Column("trace"), Column("GiB", form="g"), *common.references()], rows)


def main() -> None:
    options = common.command_line(__doc__).parse_args()
    common.run_study(NAME, measure, [*jobs_of(options.seeds)], table, options.processes)


if __name__ == "__main__":
    main()
