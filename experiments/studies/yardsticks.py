"""Measure policies by `lru@adaptive`, rebuilt systems and the upper bound, on published cells.

    python -m experiments.studies.yardsticks [--seeds 10] [--processes 2]

Cells are the replays of the evaluation split (``default``), and those of ``capacity`` with seed 0.
yardsticks.jsonl has a line per trace and seed: token hit rates by name, one per size. They depend
on no learned policy of this project except the placement of `lru@adaptive`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from experiments.studies import common, default
from hybridcache import ModelGeometry, Trace, open_trace, simulate
from hybridcache.lab.baselines import COMPARABLE
from hybridcache.lab.optimum import MemoryBudget, Relaxation, build_trie
from hybridcache.lab.simulation.sizes import budget_bytes

NAME = "yardsticks"
PEERS = ("vllm", "sglang", "lightllm", "marconi-static")
LRU_ADAPTIVE = "lru@adaptive"
BOUND = "upper bound"
BEST_REBUILT = "best rebuilt system of each cell"
EVALUATION, CAPACITY = "evaluation", "capacity"


class Job(NamedTuple):
    """All sizes of one trace with one seed."""

    split: str
    trace: str
    seed: int | None
    gib: tuple[float, ...]
    spec: str
    """Trace as ``open_trace`` takes it; the name of a workload of ``capacity``."""


def jobs_of(seeds: int) -> Iterator[Job]:
    """Yield the jobs of both splits, without missing files."""
    for one in default.jobs_of(EVALUATION, default.splits_file(), seeds):
        yield Job(EVALUATION, one.trace, one.seed, one.gib, one.spec)
    for name, workload in common.WORKLOADS.items():
        if workload.is_available:
            yield Job(CAPACITY, name, 0, workload.sizes(), name)


def measure(job: Job) -> list[dict[str, Any]]:
    """Return the record of one job."""
    if job.split == CAPACITY:
        workload = common.WORKLOADS[job.spec]
        trace, geometry, grid = workload.open(job.spec).kept(), workload.geometry, workload.grid
    else:
        trace, grid = open_trace(job.spec).kept(), 64
        geometry = ModelGeometry.preset(default.splits_file()["model"])
    result = simulate(
        trace, gib=job.gib, model=geometry, grid=grid, policy="lru", checkpoints=["adaptive"],
        baseline=PEERS, bound=False, progress=False,
    )  # fmt: skip
    rates = {
        label.removesuffix(" (rebuilt)") if runs[0].config["baseline"] else LRU_ADAPTIVE: [
            run.token_hit_rate for run in runs
        ]
        for label, runs in result.by_label().items()
    }
    prompt_tokens = result.runs[0].prompt_tokens
    rates[BOUND] = [tokens / prompt_tokens for tokens in bounds(trace, geometry, job.gib)]
    fields = {"split": job.split, "trace": job.trace, "seed": job.seed, "gib": list(job.gib)}
    return [fields | {"token_hit_rates": common.rounded(rates)}]


def bounds(trace: Trace, geometry: ModelGeometry, gib: tuple[float, ...]) -> list[int]:
    """Return the tokens that no cache of each size exceeds."""
    relaxation = Relaxation(build_trie(trace))
    row_bytes = geometry.kv_bytes_per_token * trace.unit
    budgets = (MemoryBudget(budget_bytes(size), row_bytes, geometry.state_bytes) for size in gib)
    return [relaxation.bound(budget) * trace.unit for budget in budgets]


def best_rebuilt(rates: dict[str, list[float]]) -> list[float]:
    """Return the highest rate at each size of the rebuilt systems without states elsewhere."""
    peers = [of for name, of in rates.items() if name in COMPARABLE]
    return [max(of) for of in zip(*peers, strict=True)]


def by_cell(records: common.Records, split: str) -> dict[tuple[str, Any, float], dict[str, float]]:
    """Return the rates of `lru@adaptive`, the best rebuilt system and the bound in percent, by
    (trace, seed, GiB)."""
    found = {}
    for record in records:
        rates = record["token_hit_rates"]
        shown = {name: rates[name] for name in (LRU_ADAPTIVE, BOUND)}
        shown[BEST_REBUILT] = best_rebuilt(rates)
        for place, gib in enumerate(record["gib"] if record["split"] == split else ()):
            cell = (record["trace"], record["seed"], gib)
            found[cell] = {name: 100 * of[place] for name, of in shown.items()}
    return found


def table(records: common.Records) -> common.Table:
    """Return a row per trace and size of the evaluation split, as means over seeds."""
    cells: dict[tuple[str, float], list[dict[str, float]]] = {}
    for (trace, _, gib), rates in by_cell(records, EVALUATION).items():
        cells.setdefault((trace, gib), []).append(rates)
    names = (LRU_ADAPTIVE, BEST_REBUILT, BOUND)
    rows = [
        [
            trace,
            f"{gib:g}",
            *(f"{sum(of[name] for of in found) / len(found):.1f}" for name in names),
        ]
        for (trace, gib), found in cells.items()
    ]
    return ["trace", "GiB", *(f"{name}, %" for name in names)], rows


def main() -> None:
    options = common.command_line(__doc__).parse_args()
    common.run_study(NAME, measure, [*jobs_of(options.seeds)], table, options.processes)


if __name__ == "__main__":
    main()
