"""Compare the default pair with the best pair of this project's policies.

    python -m experiments.studies.default                   # all splits, both memories
    python -m experiments.studies.default --split tuning

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

Runs of the chosen splits and pairs are replaced, others are kept. Rows "unseen" exclude cells that
were looked at while rules were chosen.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any, NamedTuple

from experiments.provenance import RESULTS, ROOT
from experiments.studies.common import STATIC_PLACEMENT, keep, measured, published, rounded
from hybridcache import ModelGeometry, Trace, closed_loop, open_trace, simulate
from hybridcache.lab.intervals import interval, paired, ratio
from hybridcache.lab.report import text_table
from hybridcache.lab.simulation.sizes import budget_bytes

NAME = "study_default"
MEMORIES = "study_memories"
"""Results of the outside traces and of two pools."""
POOLS = ", pools"
"""End of the names of splits that are replayed in two pools."""
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

Records = list[dict[str, Any]]
Table = tuple[list[str], list[list[str]]]


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
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    config = splits_file()
    for name in dict.fromkeys(map(results_of, options.split)):
        splits = [split for split in options.split if results_of(split) == name]
        simulate_splits(name, splits, config, options)
    records = read(RESULTS / f"{NAME}.jsonl") + read(RESULTS / f"{MEMORIES}.jsonl")
    print(text_table(*losses_table(records)))


def splits_file() -> dict[str, Any]:
    """Return the traces, sizes, rates and seeds of this study."""
    return tomllib.loads((ROOT / "experiments" / "splits.toml").read_text())["default-pair"]


def results_of(split: str) -> str:
    """Return the name of the file with the results of ``split``."""
    return MEMORIES if split == "outside" or split.endswith(POOLS) else NAME


def simulate_splits(
    name: str, splits: Sequence[str], config: dict[str, Any], options: argparse.Namespace
) -> None:
    """Run all pairs on ``splits``, and replace their records in the file ``name``."""
    jobs = [job for split in splits for job in jobs_of(split, config, options.seeds)]
    records = [
        record for record in read(RESULTS / f"{name}.jsonl") if record["split"] not in splits
    ]
    for found in measured(partial(run, config["model"]), jobs, options.processes):
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


def run(model: str, job: Job) -> list[dict[str, Any]]:
    """Return one record per pair and size."""
    spec = job.path
    if job.seed is not None:
        spec = f"{job.trace}{'&' if '?' in job.trace else '?'}seed={job.seed}"
    trace = open_trace(spec).kept()
    if job.rate is not None:
        return [serve_sessions(trace, model, pair, job, job.rate) for pair in PAIRS]
    records = []
    for pair in PAIRS:
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
                record["sessions"] = [
                    [one.cached_tokens, one.prompt_tokens] for one in simulated.by_session
                ]
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


def pairs_table(records: Records, split: str) -> Table:
    """Return one row per pair: hit rate and gain as means over cells, and mean TTFT if known."""
    records = [r for r in records if r["split"] == split and r["seed"] is not None]
    if not records:
        raise FileNotFoundError(f"{NAME}.jsonl has no records of the split {split}")
    rates: dict[str, dict[int, list[float]]] = {}
    for record in records:
        by_seed = rates.setdefault(record["pair"], {})
        by_seed.setdefault(record["seed"], []).append(100 * record["token_hit_rate"])
    means = {pair: [fmean(of) for of in by_seed.values()] for pair, by_seed in rates.items()}
    reference = DEFAULT if DEFAULT in means else next(iter(means))
    header = ["eviction@placement", "token hit rate, %", f"gain over `{reference}`, points"]
    ranked = sorted(means, key=lambda pair: -fmean(means[pair]))
    rows = [
        [f"`{pair}`", str(interval(means[pair])), str(paired(means[pair], means[reference]))]
        for pair in ranked
    ]
    if split == "closed loop":
        header += ["mean TTFT, ratio", "lowest", "highest"]
        ttfts: dict[str, dict[str, list[float]]] = {}
        for record in records:
            by_trace = ttfts.setdefault(record["pair"], {})
            by_trace.setdefault(record["trace"], []).append(record["ttft_mean_s"])
        for pair, row in zip(ranked, rows, strict=True):
            both = zip(ttfts[pair].values(), ttfts[reference].values(), strict=True)
            cells = [fmean(of) / fmean(ours) for of, ours in both]
            row += [f"{value:.2f}" for value in (geometric_mean(cells), min(cells), max(cells))]
    return header, rows


def losses_table(records: Records) -> Table:
    """Return the loss of the default pair to the best pair of each cell, in points."""
    seen = splits_file()["evaluation"]["seen"]
    by_cell: dict[tuple[str, str, float], dict[str, list[float]]] = {}
    generated: set[str] = set()
    for record in records:
        cell = by_cell.setdefault((record["split"], record["trace"], record["gib"]), {})
        cell.setdefault(record["pair"], []).append(100 * record["token_hit_rate"])
        if record["seed"] is not None:
            generated.add(record["trace"])
    found: dict[str, list[list[float]]] = {}
    for (split, trace, _), rates in by_cell.items():
        best = max(rates.values(), key=fmean)
        losses = [one - ours for one, ours in zip(best, rates[DEFAULT], strict=True)]
        groups = [split]
        if split.startswith("evaluation"):
            kind = "generated" if trace in generated else "published traces"
            groups = [f"{split}, {kind}"]
            groups += [f"{split}, {kind}, unseen"] * (trace.partition(", ")[0] not in seen)
        for group in groups:
            found.setdefault(group, []).append(losses)
    rows = []
    for group, cells in found.items():
        means = [fmean(losses) for losses in cells]
        over_seeds = [fmean(losses) for losses in zip(*cells, strict=True)]
        near = sum(mean <= 0.5 for mean in means)
        loss = str(interval(over_seeds))
        rows.append([group, str(len(cells)), loss, f"{max(means):.1f}", f"{near} of {len(cells)}"])
    return ["cells", "number", "mean loss, points", "worst cell", "within 0.5"], rows


def published_table(records: Records) -> Table:
    """Return both rates and the gain on the published traces, with intervals over sessions."""
    runs: dict[tuple[str, float], dict[str, dict[str, Any]]] = {}
    for record in records:
        if record["seed"] is None:
            runs.setdefault((record["trace"], record["gib"]), {})[record["pair"]] = record
    rows = []
    for (trace, gib), pairs in runs.items():
        ours, lru = (pairs[pair] for pair in COMPARED)
        rates = [100 * record["token_hit_rate"] for record in (ours, lru)]
        num_sessions = "unknown" if "sessions" in ours else "-"
        figures = [f"{rate:.1f}" for rate in (*rates, rates[0] - rates[1])]
        # Sessions are unknown if there is one per request.
        if len(ours.get("sessions", ())) < ours.get("requests", 0):
            prompts = [prompt for _, prompt in ours["sessions"]]
            reused = [[cached for cached, _ in record["sessions"]] for record in (ours, lru)]
            saved = [one - other for one, other in zip(*reused, strict=True)]
            num_sessions = str(len(prompts))
            figures = [str(ratio(part, prompts).scaled(100)) for part in (*reused, saved)]
        name = Path(trace.partition("?")[0]).name.partition(".")[0]
        rows.append([f"`{name}`", f"{gib:g}", num_sessions, *figures])
    header = ["trace", "GiB", "sessions", "default, %", "LRU with fixed rules, %", "gain, points"]
    return header, rows


if __name__ == "__main__":
    main()
