"""Compare the default pair with the best pair of this project's policies.

    python -m experiments.studies.default                   # all splits, both memories
    python -m experiments.studies.default --split tuning
    python -m experiments.studies.default --draw            # only the table and the figure

Traces, sizes and seeds are those of ``experiments/splits.toml``. A cell is one trace at one size.
The loss of a pair in a cell is the mean over seeds of its token hit rate, in points below that of
the best pair of the cell.

In the closed loops, sessions wait for their answers, sixteen requests run at once, and the default
policy admits them. Traces, sizes and rates of sessions are fixed in ``splits.toml`` too; seeds are
those of the evaluation.

Every split is replayed in both kinds of memory: the engine's arena, and two pools whose KV has
``KV_SHARES`` of the bytes. Splits of pools end in ``, pools``. Sizes go down to ``LEAST_STATES``
checkpoints. The split ``outside`` has published traces on which no policy was tuned.

Published traces run once. Records of those of the evaluation split have the reused and prompt
tokens of each session, for intervals over sessions.

Runs of the chosen splits and pairs are replaced, others are kept. The row "evaluation, unseen"
excludes cells that were looked at while rules were chosen.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from experiments.provenance import RESULTS, ROOT
from experiments.studies.common import STATIC_PLACEMENT, figure_path, keep, published, rounded
from hybridcache import ModelGeometry, Trace, closed_loop, open_trace, simulate
from hybridcache.lab.figures import COLOURS, panels, save
from hybridcache.lab.report import text_table
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.simulation.grid import collect_seldom
from hybridcache.lab.simulation.serving import serve
from hybridcache.lab.simulation.sizes import budget_bytes
from hybridcache.lab.simulation.target import build_target

NAME = "study_default"
MEMORIES = "study_memories"
"""Results of the outside traces and of two pools."""
POOLS, UNSEEN = ", pools", ", unseen"
"""Ends of the names of splits that are replayed in two pools, or that were not looked at."""
ARENA_SPLITS = ("tuning", "evaluation", "outside")
SPLITS = (*ARENA_SPLITS, *(split + POOLS for split in ARENA_SPLITS), "closed loop")
KV_SHARES = (0.15, 0.3, 0.53)
"""Parts of the bytes of two pools that are for KV."""
LEAST_STATES = 4
"""Fewest checkpoints that fit in a cell with two pools."""
DEFAULT = "survival@adaptive"
PAIRS = (
    f"lru@{STATIC_PLACEMENT}",
    "lru@adaptive",
    f"survival@{STATIC_PLACEMENT}",
    DEFAULT,
    "survival@backoff",
    "survival@boundary",
    "survival@branch,boundary",
    "survival@end",
    "marconi@adaptive",
    "gdsf@adaptive",
    "random@adaptive",
)

COMPARED = (DEFAULT, f"lru@{STATIC_PLACEMENT}")
"""Pairs that are compared on published traces, with intervals over sessions."""

Cell = tuple[str, float]
"""(trace, GiB)."""
Losses = dict[str, dict[Cell, float]]
"""Points below the best pair, by pair and cell."""


class Job(NamedTuple):
    """All pairs and sizes on one trace."""

    split: str
    trace: str
    seed: int | None
    gib: tuple[float, ...]
    path: str = ""
    """Path of the trace's file, with its options."""
    rate: float | None = None
    """Sessions per second in closed loop, or None for a replay."""
    kv_share: float | None = None
    """Part of the bytes for KV in two pools, or None for an arena."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", nargs="+", choices=SPLITS, default=SPLITS)
    parser.add_argument("--seeds", type=int, help="only the first N seeds")
    parser.add_argument(
        "--pairs",
        nargs="+",
        choices=PAIRS,
        default=PAIRS,
        metavar="PAIR",
        help="run only these and keep the runs of the others",
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--draw", action="store_true", help="only draw earlier results")
    options = parser.parse_args()
    config = tomllib.loads((ROOT / "experiments" / "splits.toml").read_text())["default-pair"]
    if not options.draw:
        for name in dict.fromkeys(map(results_of, options.split)):
            splits = [split for split in options.split if results_of(split) == name]
            simulate_splits(name, splits, config, options)
    records = read(RESULTS / f"{NAME}.jsonl") + read(RESULTS / f"{MEMORIES}.jsonl")
    by_split = {split: losses(records, split) for split in SPLITS}
    seen = set(config["evaluation"]["seen"])
    unseen = [record for record in records if record["trace"] not in seen]
    by_split["evaluation" + UNSEEN] = losses(unseen, "evaluation")
    for split, found in by_split.items():
        if found:
            print(table(split, found), end="\n\n")
            split = split.removesuffix(UNSEEN)
            print(worst_cells(records, found[DEFAULT], split), end="\n\n")
    draw({split: found for split, found in by_split.items() if found})


def results_of(split: str) -> str:
    """Return the name of the file with the results of ``split``."""
    return MEMORIES if split == "outside" or split.endswith(POOLS) else NAME


def simulate_splits(
    name: str, splits: Sequence[str], config: dict[str, Any], options: argparse.Namespace
) -> None:
    """Run the chosen pairs on ``splits``, and replace their records in the file ``name``."""
    jobs = [job for split in splits for job in jobs_of(split, config, options.seeds)]
    records = [
        record
        for record in read(RESULTS / f"{name}.jsonl")
        if record["split"] not in splits or record["pair"] not in options.pairs
    ]
    work = partial(run, config["model"], options.pairs)
    with ProcessPoolExecutor(options.processes, initializer=collect_seldom) as pool:
        for found in tqdm(pool.map(work, jobs), total=len(jobs), unit=" traces", disable=None):
            records += found
    keep(name, records)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the stored runs without their provenance."""
    if not path.exists():
        return []
    lines = map(json.loads, path.read_text().splitlines())
    return [line for line in lines if "split" in line]


def jobs_of(split: str, splits: dict[str, Any], seeds: int | None) -> Iterator[Job]:
    """Yield the jobs of ``split``, without missing files."""
    if split == "closed loop":
        config = splits["evaluation"]
        for spec, cells in config["closed-loop"].items():
            for seed in config["seeds"][:seeds]:
                yield from (Job(split, spec, seed, (gib,), rate=rate) for gib, rate in cells)
        return
    config = splits[split.removesuffix(POOLS)]
    state_bytes = ModelGeometry.load(splits["model"]).state_bytes
    for kv_share in KV_SHARES if split.endswith(POOLS) else (None,):
        least = 0.0 if kv_share is None else LEAST_STATES * state_bytes / (1 - kv_share)

        for spec, gib in config.get("gib", {}).items():
            fitting = tuple(size for size in gib if budget_bytes(size) >= least)
            for seed in config["seeds"][:seeds] if fitting else ():
                yield Job(split, spec, seed, fitting, kv_share=kv_share)
        for spec, gib in config.get("files", {}).items():
            path, fitting = published(spec), tuple(s for s in gib if budget_bytes(s) >= least)
            if path is not None and fitting:
                yield Job(split, spec, None, fitting, path, kv_share=kv_share)


def run(model: str, pairs: Sequence[str], job: Job) -> list[dict[str, Any]]:
    """Return one record per pair and size."""
    spec = job.path
    if job.seed is not None:
        spec = f"{job.trace}{'&' if '?' in job.trace else '?'}seed={job.seed}"
    trace = open_trace(spec).kept()
    if job.rate is not None:
        return [serve_sessions(trace, model, pair, job, job.rate) for pair in pairs]
    records = []
    for pair in pairs:
        eviction, _, placement = pair.partition("@")
        result = simulate(
            trace,
            model=model,
            gib=job.gib,
            policy=eviction,
            checkpoints=[placement],
            memory="arena" if job.kv_share is None else "pools",
            kv_share=job.kv_share,
            bound=False,
        )
        share = "" if job.kv_share is None else f", {job.kv_share:.0%} KV"
        for gib, simulated in zip(job.gib, result.runs, strict=True):
            rate = rounded(simulated.token_hit_rate)
            record = {"split": job.split, "trace": job.trace + share, "gib": gib}
            record["seed"] = job.seed
            record |= {"pair": pair, "token_hit_rate": rate}
            if job.split == "evaluation" and job.seed is None and pair in COMPARED:
                record["requests"] = simulated.requests
                record["sessions"] = session_sums(trace, model, gib, pair)
            records.append(record)
    return records


def serve_sessions(trace: Trace, model: str, pair: str, job: Job, rate: float) -> dict[str, Any]:
    """Return the record of a closed loop of ``rate`` sessions per second."""
    eviction, _, placement = pair.partition("@")
    [found] = closed_loop(
        trace,
        model=model,
        gib=job.gib,
        policy=eviction,
        checkpoints=[placement],
        rate=rate,
        admission="sessions",
        seeds=[job.seed or 0],
        progress=False,
    ).runs
    return {
        "split": job.split,
        "trace": f"{job.trace}, {rate:g} sessions/s",
        "gib": job.gib[0],
        "seed": job.seed,
        "pair": pair,
        "token_hit_rate": rounded(found.token_hit_rate),
        "ttft_mean_s": rounded(found.ttft_mean_s),
        "makespan_s": rounded(found.makespan_s),
    }


def session_sums(trace: Trace, model: str, gib: float, pair: str) -> list[list[int]]:
    """Return reused and prompt tokens of each session, in the order of the first requests."""
    eviction, _, placement = pair.partition("@")
    cell = Scenario(trace, model=model, gib=gib, policy=eviction, checkpoints=placement)
    log = serve(build_target(cell, trace.unit), trace, trace.unit, cell)
    sums: dict[Any, list[int]] = {}
    for request, cached, prompt in zip(trace, log.cached_tokens, log.prompt_tokens, strict=True):
        of_session = sums.setdefault(request.session, [0, 0])
        of_session[0] += cached
        of_session[1] += prompt
    return list(sums.values())


def losses(records: list[dict[str, Any]], split: str) -> Losses:
    """Return the loss of each pair in each cell."""
    rates: dict[Cell, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record["split"] == split:
            cell = record["trace"], record["gib"]
            rates[cell][record["pair"]].append(100 * record["token_hit_rate"])
    found: Losses = {}
    for cell, by_pair in rates.items():
        means = {pair: statistics.mean(values) for pair, values in by_pair.items()}
        best = max(means.values())
        for pair, mean in means.items():
            found.setdefault(pair, {})[cell] = best - mean
    return {pair: found[pair] for pair in PAIRS if pair in found}


def table(split: str, found: Losses) -> str:
    """Return one row per pair: mean, median, ninth decile and largest loss."""
    rows = []
    for pair, by_cell in found.items():
        values = list(by_cell.values())
        figures = (
            statistics.mean(values),
            statistics.median(values),
            float(np.quantile(values, 0.9)),
            max(values),
        )
        within = sum(loss <= 0.5 for loss in values)
        rows.append([pair, *(f"{figure:.2f}" for figure in figures), f"{within} of {len(values)}"])
    header = [f"{split}: points below the best", "mean", "median", "p90", "max", "within 0.5"]
    return text_table(header, rows)


def worst_cells(records: list[dict[str, Any]], found: dict[Cell, float], split: str) -> str:
    """Return the cells with the largest losses of the default pair, and the best pair of each."""
    rows = []
    for cell in sorted(found, key=lambda cell: -found[cell])[:8]:
        rates: dict[str, list[float]] = defaultdict(list)
        for record in records:
            if record["split"] == split and (record["trace"], record["gib"]) == cell:
                rates[record["pair"]].append(100 * record["token_hit_rate"])
        means = {pair: statistics.mean(values) for pair, values in rates.items()}
        best = max(means, key=lambda pair: means[pair])
        rows.append([*map(str, cell), f"{means[DEFAULT]:.1f}", f"{means[best]:.1f}", best])
    return text_table(["trace", "GiB", "default", "best", "pair"], rows)


def draw(found: dict[str, Losses]) -> None:
    """Draw the share of the cells within a loss: one panel per split, one line per pair."""
    if not found:
        return
    figure, axes = panels(len(found), width=5.4, height=3.4)
    for axis, (split, by_pair) in zip(axes, found.items(), strict=True):
        for colour, (pair, by_cell) in zip(COLOURS, by_pair.items(), strict=False):
            values = np.sort(list(by_cell.values()))
            shares = np.arange(1, len(values) + 1) / len(values)
            width = 2.5 if pair == DEFAULT else 1.2
            axis.step(values, 100 * shares, where="post", color=colour, linewidth=width, label=pair)
        axis.set_xscale("symlog", linthresh=0.5)
        axis.set_xlim(0)
        axis.set_ylim(0, 101)
        axis.set_title(f"{split}, {len(values)} cells")
        axis.set_xlabel("points of token hit rate below the best pair")
        axis.set_ylabel("cells, %")
    caption = (
        "Share of the cells (one trace at one size) in which a pair loses at most this much, mean "
        "over the seeds. Higher is better."
    )
    save(figure, axes, figure_path(NAME), caption)


if __name__ == "__main__":
    main()
