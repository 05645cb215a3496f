"""Compare the hit rates over memory of checkpoint grids of 64, 32, 16 and 1 tokens.

python -m experiments.studies.grid

No kernel has a grid of 1. `experiments.benchmarks.grid` measures the cost of the other grids.
"""

from __future__ import annotations

from typing import Any

from experiments.studies.common import (
    STATIC_PLACEMENT,
    WORKLOADS,
    Workload,
    arguments,
    figure_path,
    keep,
    slim,
    workloads,
)
from hybridcache import simulate
from hybridcache.lab.figures import COLOURS, panels, save
from hybridcache.lab.report import text_table

GRIDS = (64, 32, 16, 1)
WORKLOADS.setdefault("tree-of-thoughts", Workload("tree-of-thoughts", "0.5:16:15"))
TRACES = ("tree-of-thoughts", "short", "few-shot", "branch", "chat")
POLICIES: dict[str, dict[str, Any]] = {
    "lru": {"policy": "lru", "checkpoints": STATIC_PLACEMENT},
    "regret": {"policy": "regret", "checkpoints": "regret"},
}
"""LRU with rules without learning, and the learned pair."""
POINTS = 5


def main() -> None:
    options = arguments(__doc__, *TRACES)
    records = []
    for name in (bar := workloads(options)):
        bar.set_description(name)
        workload = WORKLOADS[name]
        trace = workload.open(name, options.full).kept()
        for policy, settings in POLICIES.items():
            for grid in GRIDS:
                found = simulate(
                    trace,
                    model=workload.geometry,
                    gib=workload.sizes(options.points or POINTS),
                    grid=grid,
                    bound=False,
                    processes=options.processes,
                    **settings,
                )
                records += [slim(name, run, label=policy) for run in found.runs]
    keep("study_grid", records)
    names = list(dict.fromkeys(record["trace"] for record in records))
    draw(records, names)
    rows = [
        [name, policy, f"{gib:.3g}", *(f"{100 * rate:.1f}" for _, rate in line)]
        for name in names
        for policy in POLICIES
        for gib in _sizes(records, name)
        for line in [[_at(records, name, policy, grid, gib) for grid in GRIDS]]
    ]
    print(text_table(["trace", "policy", "GiB", *(f"hit, % at {grid}" for grid in GRIDS)], rows))


def _sizes(records: list[dict[str, Any]], name: str) -> list[float]:
    return sorted({record["gib"] for record in records if record["trace"] == name})


def _at(
    records: list[dict[str, Any]], name: str, policy: str, grid: int, gib: float
) -> tuple[float, float]:
    """Return size and token hit rate."""
    cell = name, policy, grid, gib
    [record] = [
        record
        for record in records
        if (record["trace"], record["label"], record["grid"], record["gib"]) == cell
    ]
    return gib, record["token_hit_rate"]


def draw(records: list[dict[str, Any]], names: list[str]) -> None:
    """Draw the hit rate over memory: one panel per trace, one line per grid."""
    figure, axes = panels(len(names), columns=3)
    for axis, name in zip(axes, names, strict=False):
        for colour, grid in zip(COLOURS, GRIDS, strict=False):
            line = [_at(records, name, "regret", grid, gib) for gib in _sizes(records, name)]
            sizes, rates = zip(*line, strict=True)
            axis.plot(
                sizes,
                [100 * rate for rate in rates],
                color=colour,
                marker="o",
                markersize=3,
                linewidth=1.3,
                linestyle=":" if grid == 1 else "-",
                label=f"grid {grid}",
            )
        axis.set_title(name, fontsize=9)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("memory for KV and states, GiB")
        axis.set_ylabel("token hit rate, %")
    caption = (
        "Eviction and placement `regret`, Qwen3-Next's sizes, the engine's arena. The engine "
        "has grids of 64 (default), 32 and 16. Dotted: 1, only in the simulator."
    )
    save(figure, axes, figure_path("study_grid"), caption)


if __name__ == "__main__":
    main()
