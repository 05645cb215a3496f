"""What do slabs cost? The arena beside an ideal budget of bytes, on every cell of the goals table,
at both grids.

In the arena a state takes whole rows and lies at a multiple of its own size; the budget counts
bytes and nothing else. Policy and placement are the goals' (`regret`). Beside the hit rates: how
often a slab was emptied for a state, and how much KV was copied for that, as a share of the KV that
was written.

In a short trace one state more or less changes everything after it, so a single size says little
there. A cell that differs by more than half a point is run at 41 sizes within 2 %: the mean
difference, and the standard deviation of the budget's own hit rate over them, stand beside it.

    python -m experiments.study_arena --resume out/arena    # may be interrupted; --goals WORD: some
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.goals import ENGINE_GRID, GOALS, OURS, Goal
from experiments.lab import figure_path, keep
from hybridcache.allocators.arena import slab_rows
from hybridcache.geometry.times import Roofline
from hybridcache.lab.figures import COLOURS, panels, save
from hybridcache.lab.report import text_table
from hybridcache.lab.simulation.result import RunResult
from hybridcache.lab.simulation.serving import Serving
from hybridcache.lab.simulation.sizes import budget_bytes
from hybridcache.lab.simulation.sweep import Job, run_sweep
from hybridcache.lab.simulation.target import RunConfig
from hybridcache.lab.trace import Trace

MEMORIES = ("arena", "budget")
NEARBY = tuple(number / 1000 for number in range(-20, 21))
ALLOWED_POINTS = 0.5
"""What slabs may cost in any cell, points of token hit rate."""


def measure(goal: Goal, folder: Path | None) -> list[dict[str, Any]]:
    """A record for each grid."""
    trace = goal.trace()
    row_bytes = goal.geometry.kv_bytes_per_token * trace.unit
    rows = slab_rows(goal.geometry.state_bytes, row_bytes)
    cells = []
    for grid in (1, ENGINE_GRID):
        [(arena, ideal)] = pairs(goal, trace, grid, [0.0], folder)
        cell = record(goal, grid, trace.unit, rows, arena, ideal)
        if abs(cell["points"]) > ALLOWED_POINTS:
            cell |= around(pairs(goal, trace, grid, NEARBY, folder))
        cells.append(cell)
    return cells


def pairs(
    goal: Goal, trace: Trace, grid: int, shifts: Sequence[float], folder: Path | None
) -> list[tuple[RunResult, RunResult]]:
    """(arena, budget) with the goal's memory made larger by each of ``shifts``, a part of it."""
    grid = max(grid, trace.unit)
    common = RunConfig(goal.geometry, policy=OURS, checkpoints=OURS, grid=grid)
    serving = Serving(Roofline.fitting(goal.geometry))
    jobs = []
    for shift in shifts:
        size = budget_bytes(goal.total_gib * (1 + shift))
        jobs += [
            Job(replace(common, budget_bytes=size, memory=memory), serving) for memory in MEMORIES
        ]
    path = None if folder is None else folder / f"{goal.name.replace(' ', '-')}.jsonl"
    runs = run_sweep(trace, jobs, resume_from=path)
    return list(zip(runs[::2], runs[1::2], strict=True))


def around(runs: Sequence[tuple[RunResult, RunResult]]) -> dict[str, Any]:
    """What a cell says at the sizes nearby."""
    points = [100 * (arena.token_hit_rate - ideal.token_hit_rate) for arena, ideal in runs]
    own = [100 * ideal.token_hit_rate for _, ideal in runs]
    return {
        "sizes_around": len(runs),
        "points_around": statistics.mean(points),
        "points_around_error": statistics.stdev(points) / len(points) ** 0.5,
        "budget_spread_around": statistics.stdev(own),
    }


def record(
    goal: Goal, grid: int, unit: int, rows: int, arena: RunResult, ideal: RunResult
) -> dict[str, Any]:
    """One cell. ``rows`` of ``unit`` tokens make a slab."""
    assert arena.moved_slabs is not None and arena.moved_kv_bytes is not None
    state_rows = goal.geometry.state_bytes / (goal.geometry.kv_bytes_per_token * unit)
    return {
        "goal": goal.name,
        "grid": grid,
        "gib": round(goal.total_gib, 3),
        "unit": unit,
        "slab_rows": rows,
        "slab_waste": round(rows / state_rows - 1, 5),
        "requests": arena.requests,
        "arena": arena.token_hit_rate,
        "budget": ideal.token_hit_rate,
        "points": 100 * (arena.token_hit_rate - ideal.token_hit_rate),
        "slabs_moved_per_request": arena.moved_slabs / arena.requests,
        "kv_moved_per_kv_written": arena.moved_kv_bytes / max(arena.written_kv_bytes or 0, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--goals", default="", help="only goals whose name has this")
    parser.add_argument("--resume", type=Path, help="folder of runs that are done")
    options = parser.parse_args()
    if options.resume:
        options.resume.mkdir(parents=True, exist_ok=True)
    goals = [goal for goal in GOALS if options.goals in goal.name]
    records = [cell for goal in tqdm(goals) for cell in measure(goal, options.resume)]
    if len(goals) == len(GOALS):
        keep("study_arena", records)
        draw(records)
    print(table(records))
    over = [cell for cell in records if abs(cell["points"]) > ALLOWED_POINTS]
    for cell in over:
        print(
            f"{cell['goal']}, grid {cell['grid']}: {cell['points']:+.2f} at its size; "
            f"{cell['points_around']:+.2f} mean of {cell['sizes_around']} sizes within 2 % "
            f"(standard error {cell['points_around_error']:.2f}), over which the budget's own "
            f"hit rate has a standard deviation of {cell['budget_spread_around']:.2f}"
        )
    print(f"{len(records) - len(over)} of {len(records)} cells within {ALLOWED_POINTS} points")


def table(records: list[dict[str, Any]]) -> str:
    rows = [
        [
            cell["goal"],
            str(cell["grid"]),
            f"{100 * cell['budget']:.2f}",
            f"{100 * cell['arena']:.2f}",
            f"{cell['points']:+.2f}",
            f"{100 * cell['slab_waste']:.2f}",
            f"{cell['slabs_moved_per_request']:.3f}",
            f"{100 * cell['kv_moved_per_kv_written']:.1f}",
        ]
        for cell in records
    ]
    header = ["cell", "grid", "budget, %", "arena, %", "points", "slab waste, %"]
    return text_table([*header, "slabs moved a request", "KV moved, % of written"], rows)


def draw(records: list[dict[str, Any]]) -> None:
    """Points lost or won in each cell, and the KV that was moved for it."""
    figure, axes = panels(2, columns=2)
    names = list(dict.fromkeys(cell["goal"] for cell in records))
    for number, grid in enumerate((1, ENGINE_GRID)):
        cells = [cell for cell in records if cell["grid"] == grid]
        places = [names.index(cell["goal"]) + 0.36 * number for cell in cells]
        for axis, key, scale in ((axes[0], "points", 1), (axes[1], "kv_moved_per_kv_written", 100)):
            values = [scale * cell[key] for cell in cells]
            axis.barh(places, values, height=0.34, color=COLOURS[number], label=f"grid {grid}")
        for place, cell in zip(places, cells, strict=True):
            if "points_around" in cell:
                axes[0].plot(cell["points_around"], place, "D", color="black", markersize=3)
    for axis, label in (
        (axes[0], "arena less ideal budget, points of token hit rate"),
        (axes[1], "KV moved, % of the KV written"),
    ):
        axis.set_yticks([place + 0.18 for place in range(len(names))], names, fontsize=6)
        axis.invert_yaxis()
        axis.set_xlabel(label)
    for edge in (-ALLOWED_POINTS, ALLOWED_POINTS):
        axes[0].axvline(edge, color="#555555", linewidth=0.8, linestyle="--")
    caption = (
        "The price of slabs: hit rate of the arena against a budget that only counts bytes, policy "
        "and placement `regret`; and what is copied so that a state finds a whole slab. "
        "Dashed: half a point. "
        "Diamond: the mean of 41 sizes within 2 %, where a cell differs by more."
    )
    save(figure, axes, figure_path("study_arena"), caption)


if __name__ == "__main__":
    main()
