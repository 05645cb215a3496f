"""What do coarse pages and coarse grids cost? Hit rate over the checkpoint grid and over the KV page.

python -m experiments.study_page_grid
"""

from __future__ import annotations

from typing import Any

from experiments.lab import WORKLOADS, arguments, figure_path, keep, slim, sweep, workloads
from hybridcache.report import COLOURS, panels, save, text_table
from hybridcache.simulation.result import RunResult

GRIDS = (64, 128, 256, 512, 1024, 2048)
PAGES = (1, 16, 64, 256, 1024)
TRACES = ("chat", "few-shot", "agent", "branch", "resend", "short")

Rates = dict[str, dict[str, list[float]]]


def main() -> None:
    options = arguments(__doc__, *TRACES)
    records: list[dict[str, Any]] = []
    rates: Rates = {"grid": {}, "page": {}}
    for word in (bar := workloads(options)):
        _, high, _ = WORKLOADS[word].gib.split(":")
        by_grid = [
            _one(sweep(word, options, bar, gib=float(high), grid=grid).runs) for grid in GRIDS
        ]
        by_page = [
            _one(sweep(word, options, bar, gib=float(high), page_size=page).runs) for page in PAGES
        ]
        records += [slim(word, run) for run in (*by_grid, *by_page)]
        rates["grid"][word] = [100 * run.token_hit_rate for run in by_grid]
        rates["page"][word] = [100 * run.token_hit_rate for run in by_page]
    keep("study_page_grid", records)
    draw(rates)
    for kind, values in (("grid", GRIDS), ("page", PAGES)):
        rows = [[word, *(f"{rate:.1f}" for rate in line)] for word, line in rates[kind].items()]
        print(text_table([f"hit, % at {kind}", *map(str, values)], rows), end="\n\n")


def _one(runs: tuple[RunResult, ...]) -> RunResult:
    [run] = runs
    return run


def draw(rates: Rates) -> None:
    figure, axes = panels(2)
    for axis, (kind, values, words) in zip(
        axes,
        (("grid", GRIDS, "checkpoint grid, tokens"), ("page", PAGES, "KV page, tokens (grid 64)")),
        strict=True,
    ):
        for colour, (word, line) in zip(COLOURS, rates[kind].items(), strict=False):
            axis.plot(
                values, line, color=colour, marker="o", markersize=3, linewidth=1.3, label=word
            )
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_ylim(0, 100)
        axis.set_xlabel(words)
        axis.set_ylabel("token hit rate, %, memory ample")
    caption = "A page acts like a grid: checkpoints must sit on both. Short prompts and unique suffixes pay first."
    save(figure, axes, figure_path("study_page_grid"), caption)


if __name__ == "__main__":
    main()
