"""Measure the cost of slabs: the arena compared with an ideal budget of bytes, over memory sizes.

In the arena a state takes whole rows and starts at a multiple of its size. The budget only counts
bytes. The policies are the defaults. Besides hit rates, the study reports the number of slabs
emptied for a state, and the KV copied for that as a share of the KV written.

In a short trace, one more state changes all later decisions, so a single size says little. The
published figure is the mean difference over the sizes of a workload, with an interval over seeds.

    python -m experiments.studies.arena [--traces chat agent] [--seeds 5] [--processes 2]
"""

from __future__ import annotations

import statistics
from typing import Any

from experiments.studies import common
from experiments.tables import Column, Table
from hybridcache.lab.intervals import interval

POINTS = 5


def main() -> None:
    options = common.command_line(__doc__, *common.WORKLOADS).parse_args()
    common.run_study("study_arena", measure, common.cells_of(options), table, options.processes)


def measure(job: tuple[str, int]) -> list[dict[str, Any]]:
    """Return one record per size of (trace, seed)."""
    name, seed = job
    workload = common.WORKLOADS[name]
    trace = workload.open(name, seed).kept()
    settings: dict[str, Any] = {"model": workload.geometry, "grid": workload.grid}
    arenas, ideals = (
        common.replay(trace, workload.sizes(POINTS), memory=memory, **settings)
        for memory in ("moves", "budget")
    )
    records = []
    for arena, ideal in zip(arenas, ideals, strict=True):
        assert arena.moved_slabs is not None and arena.moved_kv_bytes is not None
        record = {
            "trace": name,
            "seed": seed,
            "grid": workload.grid,
            "gib": arena.gib,
            "requests": arena.requests,
            "token_hit_rate": arena.token_hit_rate,
            "budget": ideal.token_hit_rate,
            "points": 100 * (arena.token_hit_rate - ideal.token_hit_rate),
            "slabs_moved_per_request": arena.moved_slabs / arena.requests,
            "kv_moved_per_kv_written": arena.moved_kv_bytes / max(arena.written_kv_bytes or 0, 1),
        }
        records.append(common.rounded(record))
    return records


def table(records: common.Records) -> Table:
    """Return the mean difference, the extremes of its cells, and KV moved."""
    rows = []
    for name, cells in common.grouped(records, "trace").items():
        points = [cell["points"] for cell in cells]
        moved = max(100 * cell["kv_moved_per_kv_written"] for cell in cells)
        means = mean_differences(cells)
        size = len(cells) // len(means)
        rows.append([name, size, interval(means), min(points), max(points), moved])
    columns = [Column("trace"), Column("sizes", form="d")]
    columns += [Column("arena less ideal", "points", ".2f"), Column("lowest", "points", "+.2f")]
    return Table([*columns, Column("highest", "points", "+.2f"), Column("KV moved", "%")], rows)


def mean_differences(cells: common.Records) -> list[float]:
    """Return the mean over the sizes of one trace in points, for each seed."""
    return [
        statistics.mean(cell["points"] for cell in of)
        for of in common.grouped(cells, "seed").values()
    ]


if __name__ == "__main__":
    main()
