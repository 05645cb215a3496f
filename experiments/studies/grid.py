"""Compare checkpoint grids of 64, 32, 16 and 1 tokens, with the default policies.

    python -m experiments.studies.grid [--seeds 5] [--processes 2]

Gains are paired by seed. No kernel has a grid of 1. `docs/engine/steps.md` has the cost
of the other grids.
"""

from __future__ import annotations

from typing import Any

from experiments.studies import common
from experiments.tables import Column, Table
from hybridcache.lab.intervals import interval, paired

GRIDS = (64, 32, 16, 1)
common.WORKLOADS.setdefault("tree-of-thoughts", common.Workload("tree-of-thoughts", "0.5:16:15"))
TRACES = ("tree-of-thoughts", "short", "few-shot", "branch", "chat")
POINTS = 3


def main() -> None:
    options = common.command_line(__doc__, *TRACES).parse_args()
    common.run_study("study_grid", measure, common.cells_of(options), table, options.processes)


def measure(job: tuple[str, int]) -> list[dict[str, Any]]:
    """Return one record per grid and size of (trace, seed)."""
    name, seed = job
    workload = common.WORKLOADS[name]
    trace, sizes = workload.open(name, seed).kept(), workload.sizes(POINTS)
    records: list[dict[str, Any]] = []
    for grid in GRIDS:
        for run in common.replay(trace, sizes, model=workload.geometry, grid=grid):
            record = {"trace": name, "seed": seed, "grid": grid, "gib": run.gib}
            records.append(common.rounded(record | {"token_hit_rate": run.token_hit_rate}))
    return records


def table(records: common.Records) -> Table:
    """Return the hit rate with the first grid, and the gains of the others."""
    first, *others = GRIDS
    rows = []
    ordered = sorted(records, key=lambda record: (record["gib"], record["seed"]))
    for name, of in common.grouped(ordered, "trace").items():
        for gib, cells in common.grouped(of, "gib").items():
            rates = {
                grid: [100 * run["token_hit_rate"] for run in runs]
                for grid, runs in common.grouped(cells, "grid").items()
            }
            gains = [paired(rates[grid], rates[first]) for grid in others]
            rows.append([name, gib, interval(rates[first]), *gains])
    columns = [Column("trace"), Column("GiB", form=".3g"), Column(f"grid {first}", "%")]
    return Table([*columns, *(Column(f"gain of {one}", "points") for one in others)], rows)


if __name__ == "__main__":
    main()
