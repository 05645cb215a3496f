"""When does cost awareness pay? Hit rate, median and P99 TTFT of policies that weigh what a miss costs, and of some that do not.

    python -m experiments.study_cost_awareness [--points 6]

Requests queue for one server at a load where waiting matters. Papers report that the median and the tail can move opposite.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.lab import WORKLOADS, arguments, figure_path, keep, slim, workloads
from hybridcache.arrivals import Poisson
from hybridcache.costs import Roofline
from hybridcache.report import COLOURS, panels, save
from hybridcache.simulate import SimulationResult, simulate
from hybridcache.trace import Trace

BLIND = ("lru", "lfu", "s3-fifo", "arc")
AWARE = ("gdsf", "hits-per-token", "tail-lru", "lhd", "marconi", "regret")
LOAD = 0.9
"""Of one server, if nothing were cached."""
PRESSED = 2
"""Which of the sizes the figure shows: one where memory is short."""


def main() -> None:
    options = arguments(__doc__, "chat", "agent", "sharegpt-like", "coding-agent")
    options.points = options.points or 6
    results: list[SimulationResult] = []
    records: list[dict[str, Any]] = []
    for word in (bar := workloads(options)):
        workload = WORKLOADS[word]
        low, high, _ = workload.gib.split(":")
        result = _simulate(
            loaded(workload.open(word, options.full), Roofline.fitting(workload.geometry)),
            bar,
            gib=f"{low}:{high}:{options.points}",
            model=workload.geometry,
            grid=workload.grid,
            policy=(*BLIND, *AWARE),
            processes=options.processes,
        )
        results.append(result)
        records += [slim(word, run) for run in result.runs]
    keep("study_cost_awareness", records)
    draw(results)
    for result in results:
        for metric in ("hit", "flops", "ttft-p50", "ttft-p99"):
            print(result.table(metric), end="\n\n")


def _simulate(trace: Trace, bar: tqdm[Any], **settings: Any) -> SimulationResult:
    bar.set_description(trace.name)
    return simulate(trace, bound=False, **settings)


def loaded(trace: Trace, times: Roofline) -> Trace:
    """The same requests in the same order, arriving as a Poisson process that takes ``LOAD`` of one server without a cache."""
    requests = list(trace)
    cold_s = sum(times.seconds(0, request.num_tokens(trace.unit)) for request in requests)
    arrivals = Poisson(LOAD * len(requests) / cold_s).times(np.random.default_rng(0))
    moved = [
        request._replace(timestamp_s=when)
        for request, when in zip(requests, arrivals, strict=False)
    ]
    return Trace(trace.name, trace.unit, moved.__iter__)


def draw(results: list[SimulationResult]) -> None:
    """Each policy a point at the middle size: change of the median against change of the P99, from LRU's."""
    figure, axes = panels(len(results))
    for axis, result in zip(axes, results, strict=True):
        by_label = result.by_label()
        pressed = min(PRESSED, len(by_label["lru"]) - 1)
        lru = by_label["lru"][pressed]
        others = [(label, runs) for label, runs in by_label.items() if label != "lru"]
        for number, (label, runs) in enumerate(others):
            run = runs[pressed]
            change = [100 * (run.ttft_s[rank] / lru.ttft_s[rank] - 1) for rank in (50, 99)]
            axis.scatter(
                *change,
                s=36,
                color=COLOURS[number % len(COLOURS)],
                marker="o" if label in BLIND else "^" if number < len(COLOURS) else "s",
                label=label,
            )
        axis.axhline(0, color="black", linewidth=0.6)
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set_xlabel("median TTFT against LRU, %")
        axis.set_ylabel("P99 TTFT against LRU, %")
        axis.set_title(f"{result.trace} at {lru.gib:.3g} GiB ({result.geometry.name})", fontsize=9)
    caption = "Below and left of the cross is better than LRU. Circles ignore what a miss costs, the others weigh it."
    save(figure, axes, figure_path("study_cost_awareness"), caption)


if __name__ == "__main__":
    main()
