"""Compare routers on twelve traces.

They know nothing of the caches, estimate them from the prompts they sent, follow KV events, or know
the resumable lengths.

    python -m experiments.studies.router [--traces chat,agent] [--resume FOLDER] [--processes 2]
        [--seeds 0,1,2]

Eight replicas of one size, so fast that all prompts computed cold would keep them busy all the
time. Three conditions: little memory a replica (a quarter of what is short for one cache that
serves all), more (all of it), and little memory with events 5 s late and four replicas that die. A
seed is that of the trace, of which replicas die, and of routers that draw lots.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from tqdm import tqdm

from experiments.studies.common import STATIC_PLACEMENT, WORKLOADS, figure_path, keep, rounded
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
"""Difference of token hit rates that is a tie: one point. ``TTFT_TIED`` is the share of the mean
TTFT."""
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
    """Memory of a replica as a share of the workload's middle size."""
    delay_s: float = 0.0
    failures: int = 0


CONDITIONS = (
    Condition("little memory", 0.25),
    Condition("more memory", 1.0),
    Condition("late and failing", 0.25, 5.0, 4),
)
Cells = dict[tuple[str, str], list[FleetResult]]
"""Runs of each trace and condition: every router with every seed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", default=",".join(WORKLOADS), help="words of WORKLOADS")
    parser.add_argument("--routers", default=",".join(ROUTERS))
    parser.add_argument("--full", action="store_true", help="whole traces, not their beginnings")
    parser.add_argument("--seeds", default="0,1,2")
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
                cells[word, condition.name] = [
                    run
                    for seed in map(int, options.seeds.split(","))
                    for run in _cell(word, condition, seed, options, bar)
                ]
    keep("study_router", _records(cells))
    draw(cells)
    _report(cells)


def _cell(
    word: str, condition: Condition, seed: int, options: argparse.Namespace, bar: tqdm[Any]
) -> list[FleetResult]:
    workload = WORKLOADS[word]
    fleet = FleetConfig(
        REPLICAS, load=LOAD, delay_s=condition.delay_s, failures=condition.failures, seed=seed
    )
    jobs = fleet_jobs(
        RunConfig(
            workload.geometry, grid=workload.grid, policy="lru", checkpoints=STATIC_PLACEMENT
        ),
        fleet,
        Roofline.fitting(workload.geometry),
        options.routers.split(","),
        [float(f"{workload.middle * condition.share:.4g}")],
    )

    def show(done: int, total: int) -> None:
        bar.set_postfix_str(f"seed {seed}: {done} of {total}")

    return run_fleets(
        workload.open(word, options.full, seed),
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


class Figures(NamedTuple):
    """Figures of one router in one cell, over all seeds."""

    hits: float
    """Token hit rate, mean."""
    ttft_s: float
    """Mean TTFT, mean."""
    wait: float
    """The same as a share of a cold prefill."""
    spread: tuple[float, float]
    """The lowest and the highest hit rate."""


def _figures(runs: list[FleetResult]) -> dict[str, Figures]:
    by: dict[str, list[FleetResult]] = {}
    for run in runs:
        by.setdefault(run.fleet.router, []).append(run)
    return {
        router: Figures(
            fmean(run.token_hit_rate for run in own),
            fmean(run.ttft_mean_s for run in own),
            fmean(run.ttft_mean_s / run.cold_mean_s for run in own),
            (min(run.token_hit_rate for run in own), max(run.token_hit_rate for run in own)),
        )
        for router, own in by.items()
    }


def _report(cells: Cells) -> None:
    """A line a cell: hit rates, and where ours is not the best or tied."""
    print(f"{'':36}" + "".join(f"{router:>14}" for router in _routers(cells)))
    behind = []
    for (word, condition), runs in cells.items():
        figures = _figures(runs)
        rates = "".join(f"{100 * one.hits:9.1f}{one.ttft_s:5.2g}" for one in figures.values())
        print(f"{word:16}{condition:20}{rates}")
        behind += [f"{word}, {condition}: {what}" for what in _lost(figures)]
    print(f"token hit rate in %, mean TTFT in s, means over seeds; {len(cells)} cells")
    print("\n".join(behind) or "checkpoint is best or tied in every cell")


def _lost(figures: dict[str, Figures]) -> list[str]:
    """Return the figures in which a rival is better than ``checkpoint`` by more than a tie."""
    ours = figures.get("checkpoint")
    rivals = {word: one for word, one in figures.items() if word not in (*CONTROLS, "checkpoint")}
    if ours is None or not rivals:
        return []
    found = []
    word, most = max(rivals.items(), key=lambda item: item[1].hits)
    if most.hits > ours.hits + TIED:
        low, high = (f"{100 * rate:.1f}" for rate in ours.spread)
        gap = f"{100 * (most.hits - ours.hits):.1f}"
        found.append(f"{word} hits {gap} points more (ours {low} to {high} %)")
    word, soonest = min(rivals.items(), key=lambda item: item[1].ttft_s)
    if soonest.ttft_s * (1 + TTFT_TIED) < ours.ttft_s:
        found.append(f"mean TTFT of {word} is {ours.ttft_s / soonest.ttft_s:.2f}x shorter")
    return found


def draw(cells: Cells) -> None:
    """A panel a condition: the hit rate of each router on each trace, with its range over seeds,
    and its mean TTFT as a share of a cold prefill below it."""
    figure, axes = panels(2 * len(CONDITIONS), width=5.2, height=3.6, columns=len(CONDITIONS))
    for place, condition in enumerate(CONDITIONS):
        words = [word for word, name in cells if name == condition.name]
        figures = [_figures(cells[word, condition.name]) for word in words]
        for number, router in enumerate(_routers(cells)):
            own = [one[router] for one in figures]
            style = {"color": COLOURS[number % len(COLOURS)], "label": router, "marker": "."}
            style["linestyle"] = "--" if router in CONTROLS else "-"
            hits = [100 * one.hits for one in own]
            ranges = [100 * one.spread[0] for one in own], [100 * one.spread[1] for one in own]
            axes[place].plot(words, hits, **style, linewidth=1.1)
            axes[place].vlines(words, *ranges, color=style["color"], alpha=0.35, linewidth=2.5)
            waits = [one.wait for one in own]
            axes[place + len(CONDITIONS)].plot(words, waits, **style, linewidth=1.1)
        axes[place].set_title(condition.name, fontsize=9)
        axes[place].set_ylabel("token hit rate, %")
        axes[place + len(CONDITIONS)].set_ylabel("mean TTFT / cold prefill")
        axes[place + len(CONDITIONS)].set_yscale("log")
    for axis in axes:
        axis.tick_params(axis="x", labelrotation=60, labelsize=7)
    num_seeds = len({run.fleet.seed for runs in cells.values() for run in runs})
    caption = (
        "Eight replicas at a load of 1 (every prompt computed cold would keep all of them busy), "
        f"LRU, default placement; means of {num_seeds} seeds, bars: their range. Dashed: our rule "
        "believing in KV, and our rule with perfect news."
    )
    save(figure, axes, figure_path("study_router"), caption)


def _routers(cells: Cells) -> list[str]:
    return list(_figures(next(iter(cells.values()))))


if __name__ == "__main__":
    main()
