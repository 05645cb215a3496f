"""What do coarse pages and coarse grids cost? Hit rate over the checkpoint grid and over the KV
page.

python -m experiments.study_page_grid
"""

from __future__ import annotations

from typing import Any

from experiments.lab import WORKLOADS, arguments, figure_path, keep, slim, sweep, workloads
from hybridcache.lab.figures import COLOURS, panels, save
from hybridcache.lab.report import text_table
from hybridcache.lab.simulation.result import RunResult

GRIDS = (64, 128, 256, 512, 1024, 2048)
FINEST = GRIDS[0]
PAGES = (1, 16, 64, 256, 1024)
TRACES = ("chat", "few-shot", "agent", "branch", "resend", "short")

Rates = dict[str, dict[str, list[float]]]


def main() -> None:
    options = arguments(__doc__, *TRACES)
    records: list[dict[str, Any]] = []
    rates: Rates = {"grid": {}, "page": {}}
    shares: Rates = {"grid": {}, "page": {}}
    for word in (bar := workloads(options)):
        high = WORKLOADS[word].sizes()[-1]
        by_grid = [
            _one(sweep(word, options, bar, gib=high, grid=grid, plan_grid=FINEST, proven=True).runs)
            for grid in GRIDS
        ]
        by_page = [
            _one(sweep(word, options, bar, gib=high, page_size=page, proven=True).runs)
            for page in PAGES
        ]
        records += [slim(word, run) for run in (*by_grid, *by_page)]
        for runs, kind in ((by_grid, "grid"), (by_page, "page")):
            rates[kind][word] = [100 * run.token_hit_rate for run in runs]
            shares[kind][word] = [100 * (run.share_of_optimum or 0) for run in runs]
    keep("study_page_grid", records)
    draw(rates, shares)
    for kind, values in (("grid", GRIDS), ("page", PAGES)):
        rows = [[word, *(f"{rate:.1f}" for rate in line)] for word, line in rates[kind].items()]
        print(text_table([f"hit, % at {kind}", *map(str, values)], rows), end="\n\n")
        rows = [[word, *(f"{rate:.1f}" for rate in line)] for word, line in shares[kind].items()]
        print(text_table([f"% of optimum at {kind}", *map(str, values)], rows), end="\n\n")


def _one(runs: tuple[RunResult, ...]) -> RunResult:
    [run] = runs
    return run


def draw(rates: Rates, shares: Rates) -> None:
    """Above the hit rate, below its share of the best plan on the finest grid; left over the grid,
    right over the page."""
    figure, axes = panels(4, columns=2)
    kinds = (
        ("grid", GRIDS, "checkpoint grid, tokens"),
        ("page", PAGES, "KV page, tokens (grid 64)"),
    )
    for row, (found, label) in enumerate(
        (
            (rates, "token hit rate, %, memory ample"),
            (shares, "% of the best plan on a grid of 64"),
        )
    ):
        for axis, (kind, values, words) in zip(axes[2 * row :], kinds, strict=False):
            for colour, (word, line) in zip(COLOURS, found[kind].items(), strict=False):
                axis.plot(
                    values, line, color=colour, marker="o", markersize=3, linewidth=1.3, label=word
                )
            axis.set_xscale("log", base=2)
            axis.set_xticks(values)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.set_ylim(0, 103)
            axis.set_xlabel(words)
            axis.set_ylabel(label)
    caption = (
        "A page acts like a grid: checkpoints must sit on both. Short prompts and unique suffixes "
        "pay first. Below, the same against the best "
        "plan with hindsight (clairvoyant greedy; with so much memory the LP proves it) that may "
        "use every multiple of 64 tokens."
    )
    save(figure, axes, figure_path("study_page_grid"), caption)


if __name__ == "__main__":
    main()
