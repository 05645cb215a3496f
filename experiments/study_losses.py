"""Where are the tokens lost? Every prompt token by cause, over the memory size, with and without
good placement.

python -m experiments.study_losses [--traces chat,mooncake]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from experiments.lab import arguments, figure_path, keep, slim, sweep, title, workloads
from hybridcache.lab.figures import (
    COLOURS,
    draw_limits,
    panels,
    save,
    size_axis,
    stack_losses,
)
from hybridcache.lab.report import LOSSES_NOTE, losses_table
from hybridcache.lab.simulation.simulate import SimulationResult

TRACES = ("chat", "few-shot", "resend", "branch", "mooncake", "coding-agent")
PLACEMENTS = ("backoff", "branch,boundary,backoff,end")
"""One state a prompt, at its last aligned position, as most engines save it; and the default."""
CAPTION = (
    "Left, one state a prompt, at its end: shared beginnings are lost to checkpoints that were "
    "never made, however much memory there is. "
    "Middle, branch point and boundary saved too: only eviction is left, and on long prompts LRU "
    "then loses more to it. Dots: the best plan "
    "with hindsight (clairvoyant greedy), which may put checkpoints anywhere; right, what is "
    "reused as a share of it. " + LOSSES_NOTE
)


def main() -> None:
    options = arguments(__doc__, *TRACES, checkpoints=True)
    options.points = options.points or 8
    results: list[SimulationResult] = []
    records: list[dict[str, Any]] = []
    for word in (bar := workloads(options)):
        result = sweep(word, options, bar, checkpoints=placements(options))
        results.append(result)
        records += [slim(word, run) for run in result.runs]
    keep("study_losses", records)
    draw(results, options)
    for result in results:
        print(losses_table(result.runs), end="\n\n")


def placements(options: argparse.Namespace) -> tuple[str, ...]:
    """Those above and those named on the command line."""
    return (*PLACEMENTS, *options.checkpoints)


def draw(results: list[SimulationResult], options: argparse.Namespace) -> None:
    """Three panels a trace: the causes stacked from the top over the size, what is white was
    reused, for each placement; and what is reused as a share of the best plan."""
    shown = placements(options)
    num_panels = len(shown) + 1
    figure, axes = panels(len(results) * num_panels, 4.6, 3.1, columns=num_panels)
    for number, result in enumerate(results):
        *stacked, share = axes[num_panels * number : num_panels * (number + 1)]
        for axis, colour, placement in zip(stacked, COLOURS, shown, strict=False):
            runs = [run for run in result.runs if run.config.checkpoints == placement]
            stack_losses(axis, runs)
            draw_limits(axis, replace(result, bound_rate=None, plan_bounds={}))
            axis.set_title(f"{title(result, options)}\nLRU: {placement}", fontsize=8)
            axis.set_ylabel("prompt tokens, %")
            shares = [100 * (run.share_of_optimum or 0) for run in runs]
            sizes = [run.gib for run in runs]
            share.plot(sizes, shares, color=colour, linewidth=1.5, label=f"LRU: {placement}")
        share.axhline(100, color="black", linewidth=0.8)
        share.set_title(title(result, options), fontsize=8)
        share.set_ylabel("reused, % of the best plan")
        for axis in (*stacked, share):
            size_axis(axis)
            axis.set_ylim(0, 100 if axis is not share else 105)
    save(figure, axes, figure_path("study_losses"), CAPTION)


if __name__ == "__main__":
    main()
