"""Where should a prefill save states? Placements against each other under one eviction policy, on workloads and overlap families.

python -m experiments.study_placement [--traces chat,branch] [--points 5]
"""

from __future__ import annotations

from typing import Any

from experiments.lab import (
    WORKLOADS,
    Workload,
    arguments,
    figure_path,
    keep,
    slim,
    sweep,
    workloads,
)
from hybridcache.report import COLOURS, panels, save
from hybridcache.simulate import SimulationResult

FAMILIES = (
    "exact-hot-prefix",
    "append-only-chat",
    "diffuse-cut-points",
    "agent-tree",
    "uniform-adversary",
)
TRACES = ("chat", "few-shot", "agent", "branch", "resend", "mooncake", "coding-agent", *FAMILIES)
PLACEMENTS = (
    "none",
    "end",
    "prompt",
    "backoff",
    "branch",
    "boundary",
    "every:512",
    "every:2048",
    "branch,end",
    "branch,backoff,end",
    "branch,boundary,backoff,end",
    "branch,boundary,backoff,end,every:2048",
    "aligned:512",
    "balanced:4",
    "sqrt",
    "dyadic",
    "planned:4",
    "regret",
)


def main() -> None:
    for family in FAMILIES:
        WORKLOADS.setdefault(family, Workload(family, "0.5:16:15"))
    options = arguments(__doc__, *TRACES)
    options.points = options.points or 3
    results: list[SimulationResult] = []
    records: list[dict[str, Any]] = []
    for word in (bar := workloads(options)):
        result = sweep(word, options, bar, checkpoints=PLACEMENTS)
        results.append(result)
        records += [slim(word, run, bound=result.bound_rate) for run in result.runs]
    keep("study_placement", records)
    draw(results)
    for result in results:
        print(result.table(), end="\n\n")


def draw(results: list[SimulationResult]) -> None:
    """A panel a trace, a bar a placement: the hit rate at the largest size, and at the smallest inside it."""
    columns = 3
    figure, axes = panels(len(results), width=4.4, height=3.6, columns=columns)
    for place, (axis, result) in enumerate(zip(axes, results, strict=True)):
        by_label = {runs[0].config["checkpoints"]: runs for runs in result.by_label().values()}
        places = range(len(by_label))
        smallest, largest = (
            [100 * runs[end].token_hit_rate for runs in by_label.values()] for end in (0, -1)
        )
        sizes = [next(iter(by_label.values()))[end].gib or 0.0 for end in (0, -1)]
        axis.barh(places, largest, color=COLOURS[0], alpha=0.35, height=0.8, label="much memory")
        axis.barh(places, smallest, color=COLOURS[0], height=0.45, label="little memory")
        labels = list(by_label) if place % columns == 0 else [""] * len(by_label)
        axis.set_yticks(places, labels, fontsize=7)
        axis.invert_yaxis()
        if result.bound_rate is not None:
            axis.axvline(
                100 * result.bound_rate,
                color="black",
                linewidth=0.8,
                linestyle=":",
                label="infinite cache",
            )
        axis.set_xlim(0, 100)
        axis.set_xlabel(f"token hit rate, %, at {sizes[0]:g} and {sizes[1]:g} GiB, LRU")
        axis.set_title(result.trace, fontsize=9)
    caption = "No single position serves every trace: the branch point carries shared beginnings, the end and the back-off carry continuations and repeats."
    save(figure, axes, figure_path("study_placement"), caption)


if __name__ == "__main__":
    main()
