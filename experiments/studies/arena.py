"""Measure the cost of slabs: the arena compared with an ideal budget of bytes, over memory sizes.

In the arena a state takes whole rows and starts at a multiple of its size. The budget only counts
bytes. The policies are the defaults. Besides hit rates, the study reports the number of slabs
emptied for a state, and the KV copied for that as a share of the KV written.

In a short trace, one more state changes all later decisions, so a single size says little. The
published figure is the mean difference over the sizes of a workload, with an interval over seeds.

    python -m experiments.studies.arena [--traces chat,agent] [--points 8] [--seeds 10]
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from experiments.studies.common import (
    WORKLOADS,
    arguments,
    keep,
    rounded,
    workloads,
)
from hybridcache import simulate
from hybridcache.lab.intervals import interval
from hybridcache.lab.report import text_table

NAME = "study_arena"
POINTS = 5
MEMORIES = ("arena", "budget")


def main() -> None:
    options = arguments(__doc__, *WORKLOADS)
    records: list[dict[str, Any]] = []
    for name in (bar := workloads(options)):
        for seed in WORKLOADS[name].seeds(options.seeds):
            bar.set_description(f"{name}, seed {seed}")
            records += measure(name, seed, options)
        keep(NAME, records)
    print(text_table(*table(records)))


def measure(name: str, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one record per size."""
    workload = WORKLOADS[name]
    trace = workload.open(name, options.full, seed).kept()
    runs = {
        memory: simulate(
            trace,
            model=workload.geometry,
            gib=workload.sizes(options.points or POINTS),
            grid=workload.grid,
            memory=memory,
            bound=False,
            processes=options.processes,
        ).runs
        for memory in MEMORIES
    }
    records = []
    for arena, ideal in zip(runs["arena"], runs["budget"], strict=True):
        assert arena.moved_slabs is not None and arena.moved_kv_bytes is not None
        records.append(
            {
                "trace": name,
                "seed": seed,
                "grid": workload.grid,
                "gib": rounded(arena.gib),
                "requests": arena.requests,
                "token_hit_rate": rounded(arena.token_hit_rate),
                "budget": rounded(ideal.token_hit_rate),
                "points": rounded(100 * (arena.token_hit_rate - ideal.token_hit_rate)),
                "slabs_moved_per_request": rounded(arena.moved_slabs / arena.requests),
                "kv_moved_per_kv_written": rounded(
                    arena.moved_kv_bytes / max(arena.written_kv_bytes or 0, 1)
                ),
            }
        )
    return records


def by_trace(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(record["trace"], []).append(record)
    return found


def table(records: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: the mean difference, the extremes of its cells, and KV moved."""
    rows = []
    for name, cells in by_trace(records).items():
        points = [cell["points"] for cell in cells]
        moved = max(100 * cell["kv_moved_per_kv_written"] for cell in cells)
        rows.append(
            [
                name,
                f"{len(cells) // len(mean_differences(cells))}",
                f"{interval(mean_differences(cells)):.2f}",
                f"{min(points):+.2f}",
                f"{max(points):+.2f}",
                f"{moved:.1f}",
            ]
        )
    header = ["trace", "sizes", "arena less ideal, points", "lowest", "highest", "KV moved, %"]
    return header, rows


def mean_differences(cells: list[dict[str, Any]]) -> list[float]:
    """Return the mean over the sizes of one trace in points, for each seed."""
    by_seed: dict[int, list[float]] = {}
    for cell in cells:
        by_seed.setdefault(cell["seed"], []).append(cell["points"])
    return [statistics.mean(points) for points in by_seed.values()]


if __name__ == "__main__":
    main()
