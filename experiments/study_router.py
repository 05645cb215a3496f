"""Which replica should a request go to? Routers that know nothing, that guess from what they sent,
that know the KV, and that know what can be resumed, on twelve traces.

    python -m experiments.study_router [--traces chat,agent] [--resume FOLDER] [--processes 2]

Eight replicas of one size, so fast that all prompts computed cold would keep them busy all the
time. Three conditions: little memory a replica (a quarter of what is short for one cache that
serves all), more (all of it), and little memory with events 5 s late and four replicas that die.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from experiments.lab import WORKLOADS, figure_path, keep, rounded
from hybridcache.geometry.times import Roofline
from hybridcache.lab.figures import COLOURS, panels, save
from hybridcache.lab.replicas.fleet import FleetConfig
from hybridcache.lab.replicas.result import FleetResult
from hybridcache.lab.replicas.runs import fleet_jobs, run_fleets
from hybridcache.lab.simulation.grid import Place
from hybridcache.lab.simulation.sweep import collect_seldom
from hybridcache.lab.simulation.target import RunConfig

REPLICAS = 8
LOAD = 1.0
TIED = 0.01
"""Of the token hit rate: within a point, or within a twentieth of the mean TTFT, is a tie."""
TTFT_TIED = 0.05
ROUTERS = (
    "round_robin",
    "least_loaded",
    "session",
    "text",
    "text-ray",
    "kv",
    "kv-seconds",
    "checkpoint",
    "oracle",
)
CONTROLS = ("kv-seconds", "oracle")
"""Not rivals: our own rule with less knowledge, and with more than there is."""


class Condition(NamedTuple):
    name: str
    share: float
    """Of the workload's middle size, a replica."""
    delay_s: float = 0.0
    failures: int = 0


CONDITIONS = (
    Condition("little memory", 0.25),
    Condition("more memory", 1.0),
    Condition("late and failing", 0.25, 5.0, 4),
)
Cells = dict[tuple[str, str], list[FleetResult]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", default=",".join(WORKLOADS), help="words of WORKLOADS")
    parser.add_argument("--routers", default=",".join(ROUTERS))
    parser.add_argument("--full", action="store_true", help="whole traces, not their beginnings")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--ray", help="address of a Ray cluster to spread the runs over")
    parser.add_argument("--resume", type=Path, help="folder that keeps runs until all are done")
    options = parser.parse_args()
    collect_seldom()
    words = [word for word in options.traces.split(",") if WORKLOADS[word].is_here]
    cells: Cells = {}
    with tqdm(words, disable=None) as bar:
        for word in bar:
            for condition in CONDITIONS:
                bar.set_description(f"{word}, {condition.name}")
                cells[word, condition.name] = _cell(word, condition, options, bar)
    keep("study_router", _records(cells))
    draw(cells)
    _report(cells)


def _cell(
    word: str, condition: Condition, options: argparse.Namespace, bar: tqdm[Any]
) -> list[FleetResult]:
    workload = WORKLOADS[word]
    fleet = FleetConfig(REPLICAS, load=LOAD, delay_s=condition.delay_s, failures=condition.failures)
    jobs = fleet_jobs(
        RunConfig(workload.geometry, grid=workload.grid),
        fleet,
        Roofline.fitting(workload.geometry),
        options.routers.split(","),
        [float(f"{workload.middle * condition.share:.4g}")],
    )

    def show(done: int, total: int) -> None:
        bar.set_postfix_str(f"{done} of {total}")

    return run_fleets(
        workload.open(word, options.full),
        jobs,
        place=Place(options.processes, options.ray),
        resume_from=options.resume / f"{word}.jsonl" if options.resume else None,
        progress=show,
    )


def _records(cells: Cells) -> list[dict[str, Any]]:
    return [
        {"trace": word, "condition": condition} | rounded(run.as_record() | {"trace": word})
        for (word, condition), runs in cells.items()
        for run in runs
    ]


def _report(cells: Cells) -> None:
    """A line a cell: hit rates, and where ours is not the best or tied."""
    print(f"{'':36}" + "".join(f"{run.fleet.router:>14}" for run in next(iter(cells.values()))))
    behind = []
    for (word, condition), runs in cells.items():
        rates = "".join(f"{100 * run.token_hit_rate:9.1f}{run.ttft_mean_s:5.2g}" for run in runs)
        print(f"{word:16}{condition:20}{rates}")
        behind += [f"{word}, {condition}: {what}" for what in _lost(runs)]
    print(f"token hit rate in %, mean TTFT in s; {len(cells)} cells")
    print("\n".join(behind) or "checkpoint is best or tied in every cell")


def _lost(runs: list[FleetResult]) -> list[str]:
    """Where a rival is better than ``checkpoint`` by more than a tie."""
    by = {run.fleet.router: run for run in runs}
    ours = by.get("checkpoint")
    rivals = [run for word, run in by.items() if word not in (*CONTROLS, "checkpoint")]
    if ours is None or not rivals:
        return []
    found = []
    most = max(rivals, key=lambda run: run.token_hit_rate)
    if most.token_hit_rate > ours.token_hit_rate + TIED:
        gap = 100 * (most.token_hit_rate - ours.token_hit_rate)
        found.append(f"{most.fleet.router} hits {gap:.1f} points more")
    soonest = min(rivals, key=lambda run: run.ttft_mean_s)
    if soonest.ttft_mean_s * (1 + TTFT_TIED) < ours.ttft_mean_s:
        ratio = ours.ttft_mean_s / soonest.ttft_mean_s
        found.append(f"mean TTFT of {soonest.fleet.router} is {ratio:.2f}x shorter")
    return found


def draw(cells: Cells) -> None:
    """A panel a condition: the hit rate of each router on each trace, and its mean TTFT as a share
    of a cold prefill below it."""
    figure, axes = panels(2 * len(CONDITIONS), width=5.2, height=3.6, columns=len(CONDITIONS))
    for place, condition in enumerate(CONDITIONS):
        words = [word for word, name in cells if name == condition.name]
        for number, router in enumerate(_routers(cells)):
            runs = [_of(cells[word, condition.name], router) for word in words]
            style = {"color": COLOURS[number % len(COLOURS)], "label": router, "marker": "."}
            style["linestyle"] = "--" if router in CONTROLS else "-"
            hits = [100 * run.token_hit_rate for run in runs]
            waits = [run.ttft_mean_s / run.cold_mean_s for run in runs]
            axes[place].plot(words, hits, **style, linewidth=1.1)
            axes[place + len(CONDITIONS)].plot(words, waits, **style, linewidth=1.1)
        axes[place].set_title(condition.name, fontsize=9)
        axes[place].set_ylabel("token hit rate, %")
        axes[place + len(CONDITIONS)].set_ylabel("mean TTFT / cold prefill")
        axes[place + len(CONDITIONS)].set_yscale("log")
    for axis in axes:
        axis.tick_params(axis="x", labelrotation=60, labelsize=7)
    caption = (
        "Eight replicas at a load of 1 (every prompt computed cold would keep all of them busy), "
        "LRU, default placement. Dashed: our rule believing in KV, and our rule with perfect news."
    )
    save(figure, axes, figure_path("study_router"), caption)


def _routers(cells: Cells) -> list[str]:
    return [run.fleet.router for run in next(iter(cells.values()))]


def _of(runs: list[FleetResult], router: str) -> FleetResult:
    return next(run for run in runs if run.fleet.router == router)


if __name__ == "__main__":
    main()
