"""Measure the cost of slabs: the arena next to an ideal budget of bytes, over the sizes of
workloads.

In the arena a state takes whole rows and starts at a multiple of its own size; the budget counts
bytes and nothing else. The policies are the defaults. Next to the hit rates: the number of slabs
emptied for a state, and the KV copied for that as a share of the KV written.

One state more or less changes everything after it in a short trace, so a single size says little.
The figure published is the mean difference over the sizes of a workload.

    python -m experiments.studies.arena [--traces chat,agent] [--points 8] [--resume FOLDER]
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from tqdm import tqdm

from experiments.studies.common import (
    WORKLOADS,
    arguments,
    figure_path,
    keep,
    rounded,
    workloads,
)
from hybridcache import simulate
from hybridcache.lab.figures import COLOURS, panels, save, size_axis
from hybridcache.lab.report import text_table

NAME = "study_arena"
MEMORIES = ("arena", "budget")


def main() -> None:
    options = arguments(__doc__, *WORKLOADS)
    records: list[dict[str, Any]] = []
    for word in (bar := workloads(options)):
        records += measure(word, options, bar)
        keep(NAME, records)
    print(table(records))
    draw(records)


def measure(word: str, options: argparse.Namespace, bar: tqdm[Any]) -> list[dict[str, Any]]:
    """A record for each size."""
    workload = WORKLOADS[word]
    trace = workload.open(word, options.full).kept()
    bar.set_description(word)
    runs = {
        memory: simulate(
            trace,
            model=workload.geometry,
            gib=workload.sizes(options.points),
            grid=workload.grid,
            memory=memory,
            bound=False,
            processes=options.processes,
            resume_from=options.resume / f"{word}.jsonl" if options.resume else None,
        ).runs
        for memory in MEMORIES
    }
    records = []
    for arena, ideal in zip(runs["arena"], runs["budget"], strict=True):
        assert arena.moved_slabs is not None and arena.moved_kv_bytes is not None
        records.append(
            {
                "trace": word,
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


def table(records: list[dict[str, Any]]) -> str:
    """A row a workload: mean and extremes of the difference over its sizes."""
    rows = []
    for word, cells in by_trace(records).items():
        points = [cell["points"] for cell in cells]
        figures = (statistics.mean(points), min(points), max(points))
        moved = max(100 * cell["kv_moved_per_kv_written"] for cell in cells)
        rows.append([word, str(len(cells)), *(f"{one:+.2f}" for one in figures), f"{moved:.1f}"])
    return text_table(["points", "sizes", "mean", "lowest", "highest", "KV moved, %"], rows)


def draw(records: list[dict[str, Any]]) -> None:
    """Points lost or won over sizes, and the KV that was moved for it."""
    figure, axes = panels(2, columns=2, width=5.4, height=3.6)
    for number, (word, cells) in enumerate(by_trace(records).items()):
        sizes = [cell["gib"] for cell in cells]
        for axis, key, scale in ((axes[0], "points", 1), (axes[1], "kv_moved_per_kv_written", 100)):
            values = [scale * cell[key] for cell in cells]
            axis.plot(sizes, values, ".-", color=COLOURS[number % len(COLOURS)], label=word)
    axes[0].set_ylabel("arena less ideal budget, points of token hit rate")
    axes[1].set_ylabel("KV moved, % of the KV written")
    for axis in axes:
        size_axis(axis)
    caption = "Hit rate of the arena against a budget that only counts bytes; the default policies."
    save(figure, axes, figure_path(NAME), caption)


if __name__ == "__main__":
    main()
