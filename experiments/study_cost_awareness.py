"""When does cost awareness pay? Hit rate, median and P99 TTFT of policies that weigh what a miss costs, and of some that do not.

    python -m experiments.study_cost_awareness [--points 6]

Requests queue for one server at a load where waiting matters. Papers report that the median and the tail can move opposite.
"""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from experiments.lab import WORKLOADS, arguments, figure_path, keep, slim, workloads
from hybridcache.costs import Roofline
from hybridcache.report import COLOURS, panels, save
from hybridcache.simulate import SimulationResult, simulate
from hybridcache.trace import Trace, TraceRequest

BLIND = ("lru", "lfu", "s3-fifo", "arc")
AWARE = ("gdsf", "hits-per-token", "tail-lru", "lhd", "marconi", "regret")
LOAD = 0.7
"""Of one server, if nothing were cached and half of the time were saved."""


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
    """The same requests with their distances scaled so that ``LOAD`` of a server is taken when half the work is saved."""
    requests = list(trace)
    work_s = sum(times.seconds(0, request.num_tokens(trace.unit)) for request in requests) / 2
    span_s = max(requests[-1].timestamp_s - requests[0].timestamp_s, 1e-9)
    scale = work_s / LOAD / span_s
    moved = [_at(request, request.timestamp_s * scale) for request in requests]
    return Trace(trace.name, trace.unit, moved.__iter__)


def _at(request: TraceRequest, timestamp_s: float) -> TraceRequest:
    return request._replace(timestamp_s=timestamp_s)


def draw(results: list[SimulationResult]) -> None:
    """Each policy a point at the middle size: change of the median against change of the P99, from LRU's."""
    figure, axes = panels(len(results))
    for axis, result in zip(axes, results, strict=True):
        by_label = result.by_label()
        middle = len(by_label["lru"]) // 2
        lru = by_label["lru"][middle]
        for number, (label, runs) in enumerate(by_label.items()):
            run = runs[middle]
            change = [100 * (run.ttft_s[rank] / lru.ttft_s[rank] - 1) for rank in (50, 99)]
            axis.scatter(
                *change,
                s=36,
                color=COLOURS[number % len(COLOURS)],
                marker="o" if label in BLIND else "^",
                label=label,
            )
        axis.axhline(0, color="black", linewidth=0.6)
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set_xlabel("median TTFT against LRU, %")
        axis.set_ylabel("P99 TTFT against LRU, %")
        axis.set_title(f"{result.trace} at {lru.gib:.3g} GiB ({result.geometry.name})", fontsize=9)
    caption = "Below and left of the cross is better than LRU. Circles ignore what a miss costs, triangles weigh it."
    save(figure, axes, figure_path("study_cost_awareness"), caption)


if __name__ == "__main__":
    main()
