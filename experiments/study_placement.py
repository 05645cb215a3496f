"""Where should a prefill save states? Placements against each other under one eviction policy, on
workloads and overlap families.

python -m experiments.study_placement [--traces chat,branch] [--points 5]
"""

from __future__ import annotations

import argparse
from typing import Any

from experiments.lab import (
    WORKLOADS,
    Workload,
    arguments,
    figure_path,
    keep,
    slim,
    sweep,
    title,
    workloads,
)
from hybridcache.lab.figures import COLOURS, panels, save
from hybridcache.lab.report import METRICS
from hybridcache.lab.simulation.simulate import SimulationResult

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
    options = arguments(__doc__, *TRACES, checkpoints=True)
    options.points = options.points or 3
    results: list[SimulationResult] = []
    records: list[dict[str, Any]] = []
    for word in (bar := workloads(options)):
        result = sweep(word, options, bar, checkpoints=(*PLACEMENTS, *options.checkpoints))
        results.append(result)
        records += [slim(word, run, bound=result.bound_rate) for run in result.runs]
    keep("study_placement", records)
    draw(results, options)
    for result in results:
        print(result.table(), result.table("optimum"), sep="\n\n", end="\n\n")


def draw(results: list[SimulationResult], options: argparse.Namespace) -> None:
    """A panel a trace, a bar a placement: the hit rate at the largest size, and at the smallest
    inside it; in figures at the right, both as shares of the best plan."""
    columns = 3
    figure, axes = panels(len(results), width=4.9, height=4.0, columns=columns)
    for place, (axis, result) in enumerate(zip(axes, results, strict=True)):
        by_label = {runs[0].config.checkpoints: runs for runs in result.by_label().values()}
        places = range(len(by_label))
        styles = (
            (-1, {"alpha": 0.35, "height": 0.8, "label": "much memory"}, "much"),
            (0, {"height": 0.45, "label": "little memory"}, "little"),
        )
        for end, style, words in styles:
            runs = [runs[end] for runs in by_label.values()]
            axis.barh(places, [100 * run.token_hit_rate for run in runs], color=COLOURS[0], **style)
            column = 106 if words == "little" else 124
            for at, run in zip(places, runs, strict=True):
                share = METRICS["optimum"].text(run).partition(".")[0]
                axis.text(column, at, share, fontsize=6.5, ha="center", va="center")
            axis.text(column, -1.2, words, fontsize=6.5, ha="center", va="center")
            plan = 100 * (runs[0].optimum_tokens or 0) / runs[0].prompt_tokens
            axis.axvline(
                plan,
                color="black",
                linewidth=1.0,
                linestyle="-" if words == "much" else "--",
                label=f"best plan with hindsight, {words} memory",
            )
        axis.text(115, -2.2, "% of the best plan", fontsize=6.5, ha="center", va="center")
        sizes = [next(iter(by_label.values()))[end].gib or 0.0 for end in (0, -1)]
        labels = list(by_label) if place % columns == 0 else [""] * len(by_label)
        axis.set_yticks(places, labels, fontsize=7)
        axis.set_ylim(len(by_label) - 0.4, -2.8)
        axis.set_xlim(0, 132)
        axis.set_xticks(range(0, 101, 20))
        axis.set_xlabel(f"token hit rate, %, at {sizes[0]:g} and {sizes[1]:g} GiB, LRU")
        axis.set_title(title(result, options), fontsize=8.5)
    caption = (
        "No single position serves every trace: the branch point carries shared beginnings, the "
        "end and the back-off carry continuations and "
        "repeats. The figures say how far each is from the best plan with hindsight (clairvoyant "
        "greedy, which places checkpoints freely): with "
        "much memory a good placement leaves nothing, with little memory LRU leaves most of it."
    )
    save(figure, axes, figure_path("study_placement"), caption)


if __name__ == "__main__":
    main()
