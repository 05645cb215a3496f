"""When does cost awareness pay? Hit rate, median and P99 TTFT of policies that weigh what a miss
costs, and of some that do not.

    python -m experiments.study_cost_awareness [--points 8]

Requests queue for one server at a load where waiting matters. Papers report that the median and the
tail can move opposite.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from experiments.lab import (
    STATIC_PLACEMENT,
    WORKLOADS,
    arguments,
    by_competitor,
    figure_path,
    keep,
    measured,
    slim,
    title,
    workloads,
)
from hybridcache import Trace, simulate
from hybridcache.geometry.times import Roofline
from hybridcache.lab.arrivals import Poisson
from hybridcache.lab.figures import COLOURS, panels, save
from hybridcache.lab.report import METRICS
from hybridcache.lab.simulation.result import RunResult
from hybridcache.lab.simulation.simulate import SimulationResult

BLIND = ("lru", "lfu", "s3-fifo", "arc")
AWARE = ("gdsf", "hits-per-token", "tail-lru", "lhd", "marconi", "regret")
LOAD = 0.9
"""Of one server, if nothing were cached."""
PRESSED = 0.5
"""Where on the axis of sizes the figure looks, as a part of its length: where memory is short."""


def main() -> None:
    options = arguments(__doc__, "chat", "agent", "sharegpt-like", "coding-agent", policy=True)
    options.points = options.points or 3
    results: list[SimulationResult] = []
    records: list[dict[str, Any]] = []
    for word in (bar := workloads(options)):
        workload = WORKLOADS[word]
        bar.set_description(word)
        result = simulate(
            loaded(workload.open(word, options.full), Roofline.fitting(workload.geometry)),
            gib=workload.sizes(options.points),
            model=workload.geometry,
            grid=workload.grid,
            policy=(*BLIND, *AWARE, *options.policy),
            checkpoints=STATIC_PLACEMENT,
            processes=options.processes,
        )
        result = measured(result, word, options.full)
        results.append(result)
        records += [slim(word, run) for run in result.runs]
    keep("study_cost_awareness", records)
    draw(results, options)
    for result in results:
        for metric in ("hit", "optimum", "flops", "ttft-p50", "ttft-p99"):
            print(result.table(metric), end="\n\n")


def loaded(trace: Trace, times: Roofline) -> Trace:
    """The same requests in the same order, arriving as a Poisson process that takes ``LOAD`` of one
    server without a cache."""
    requests = list(trace)
    cold_s = sum(times.seconds(0, request.num_tokens(trace.unit)) for request in requests)
    arrivals = Poisson(LOAD * len(requests) / cold_s).times(np.random.default_rng(0))
    moved = [
        request._replace(timestamp_s=when)
        for request, when in zip(requests, arrivals, strict=False)
    ]
    return Trace(trace.name, trace.unit, moved.__iter__)


def draw(results: list[SimulationResult], options: argparse.Namespace) -> None:
    """Three panels a trace, a bar a policy, at a size where memory is short: the hit rate and its
    share of the best plan, and the change of the median and of the P99 from LRU's."""
    figure, axes = panels(3 * len(results), width=4.9, height=3.1, columns=3)
    for number, result in enumerate(results):
        by_label = by_competitor(result)
        pressed = round(PRESSED * (len(by_label["lru"]) - 1))
        runs = {label: runs[pressed] for label, runs in by_label.items()}
        hit, median, tail = axes[3 * number : 3 * number + 3]
        _bars(hit, runs, {label: 100 * run.token_hit_rate for label, run in runs.items()}, "{:.1f}")
        for place, run in enumerate(runs.values()):
            share = METRICS["optimum"].text(run)
            hit.text(118, place, share, fontsize=7, ha="center", va="center")
        hit.text(118, -1, "% of best plan", fontsize=7, ha="center", va="center")
        plan = 100 * (runs["lru"].optimum_tokens or 0) / runs["lru"].prompt_tokens
        hit.axvline(plan, color="black", linewidth=1.0, label="best plan with hindsight")
        hit.set_xlim(0, 130)
        hit.set_xticks(range(0, 101, 20))
        hit.set_xlabel(f"token hit rate, %, at {runs['lru'].gib:.3g} GiB")
        hit.set_title(title(result, options), fontsize=8.5)
        for axis, rank, words in ((median, 50, "median"), (tail, 99, "P99")):
            lru = runs["lru"].ttft_s[rank]
            changes = {
                label: round(100 * (run.ttft_s[rank] / lru - 1), 1) + 0.0
                for label, run in runs.items()
            }
            _bars(axis, runs, changes, "{:+.1f}")
            axis.use_sticky_edges = False  # room for the figures on both sides
            axis.margins(x=0.2)
            axis.axvline(0, color="black", linewidth=0.6)
            axis.set_xlabel(f"change of the {words} TTFT from LRU's ({1e3 * lru:,.0f} ms), %")
    caption = (
        "Left of zero is faster than LRU. Blue policies ignore what a miss costs, red ones weigh "
        "it. What moves the times is reuse (first "
        "column, beside it the share of the clairvoyant greedy's plan); median and P99 of one "
        "policy can move by very different amounts, and "
        "opposite ways."
    )
    save(figure, axes, figure_path("study_cost_awareness"), caption)


def _bars(axis: Any, runs: dict[str, RunResult], values: dict[str, float], form: str) -> None:
    for words, group, colour in (
        ("blind to the cost of a miss", BLIND, COLOURS[0]),
        ("weigh the cost of a miss", AWARE, COLOURS[1]),
        ("named on the command line", set(runs) - {*BLIND, *AWARE}, COLOURS[2]),
    ):
        places = [place for place, label in enumerate(runs) if label in group]
        if not places:
            continue
        bars = axis.barh(
            places,
            [values[label] for label in runs if label in group],
            color=colour,
            height=0.65,
            label=words,
        )
        for text in axis.bar_label(bars, fmt=form, fontsize=7, padding=2):
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.8})
    axis.set_yticks(range(len(runs)), list(runs), fontsize=8)
    axis.set_ylim(len(runs) - 0.5, -1.5)


if __name__ == "__main__":
    main()
