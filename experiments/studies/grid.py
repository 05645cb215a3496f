"""Compare checkpoint grids of 16 and 32 tokens with 64: hit rate over memory at each grid, and at a
grid of 1, which no kernel has.

python -m experiments.studies.grid

`experiments.benchmarks.grid` measures its cost.
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
"""LRU with rules that learn nothing, and the learned pair."""
POINTS = 5


def main() -> None:
    options = arguments(__doc__, *TRACES)
    records = []
    for word in (bar := workloads(options)):
        bar.set_description(word)
        workload = WORKLOADS[word]
        trace = workload.open(word, options.full).kept()
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
                records += [slim(word, run, label=policy) for run in found.runs]
    keep("study_grid", records)
    words = list(dict.fromkeys(record["trace"] for record in records))
    draw(records, words)
    rows = [
        [word, policy, f"{gib:.3g}", *(f"{100 * rate:.1f}" for _, rate in line)]
        for word in words
        for policy in POLICIES
        for gib in _sizes(records, word)
        for line in [[_at(records, word, policy, grid, gib) for grid in GRIDS]]
    ]
    print(text_table(["trace", "policy", "GiB", *(f"hit, % at {grid}" for grid in GRIDS)], rows))


def _sizes(records: list[dict[str, Any]], word: str) -> list[float]:
    return sorted({record["gib"] for record in records if record["trace"] == word})


def _at(
    records: list[dict[str, Any]], word: str, policy: str, grid: int, gib: float
) -> tuple[float, float]:
    """Size and token hit rate."""
    wanted = word, policy, grid, gib
    [record] = [
        record
        for record in records
        if (record["trace"], record["label"], record["grid"], record["gib"]) == wanted
    ]
    return gib, record["token_hit_rate"]


def draw(records: list[dict[str, Any]], words: list[str]) -> None:
    """A panel a trace: hit rate over memory, a line a grid."""
    figure, axes = panels(len(words), columns=3)
    for axis, word in zip(axes, words, strict=False):
        for colour, grid in zip(COLOURS, GRIDS, strict=False):
            line = [_at(records, word, "regret", grid, gib) for gib in _sizes(records, word)]
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
        axis.set_title(word, fontsize=9)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("memory for KV and states, GiB")
        axis.set_ylabel("token hit rate, %")
    caption = (
        "Policy regret with its own placement, Qwen3-Next's sizes, the engine's arena. The engine "
        "has grids of 64 (default), 32 and 16; dotted: of 1, the simulator's alone."
    )
    save(figure, axes, figure_path("study_grid"), caption)


if __name__ == "__main__":
    main()
