"""Compare the default pair with the best pair of this project's policies.

    python -m experiments.studies.default               # tuning, evaluation and closed loops
    python -m experiments.studies.default --memories    # two pools, and the outside traces

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

Rows "unseen" exclude cells that were looked at while rules were chosen.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any, NamedTuple

from experiments.provenance import ROOT
from experiments.studies import common
from experiments.tables import Cell, Column, Table
from hybridcache import ModelGeometry, open_trace
from hybridcache.lab.results.result import ClosedLoopRun, RunResult
from hybridcache.lab.traces.intervals import interval, paired, ratio
from hybridcache.lab.traces.sizes import budget_bytes

NAME = "study_default"
MEMORIES = "study_memories"
"""Results of the outside traces and of two pools."""
POOLS = ", pools"
"""End of the names of splits that are replayed in two pools."""
OVER_SIZES = ", means over sizes"
"""End of the names of groups in which a cell is the mean over the sizes of a trace."""
ARENA_SPLITS = ("tuning", "evaluation", "outside")
RESULTS_OF = {
    NAME: ("tuning", "evaluation", "closed loop"),
    MEMORIES: ("outside", *(split + POOLS for split in ARENA_SPLITS)),
}
"""Splits by the name of their result file."""
KV_SHARES = (0.15, 0.3, 0.53)
"""Parts of the bytes of two pools that are for KV."""
LEAST_STATES = 4
"""Fewest checkpoints that fit in a cell with two pools."""
PAIRS = (
    common.LRU,
    "lru@adaptive",
    f"survival@{common.STATIC_PLACEMENT}",
    common.DEFAULT,
    "survival@backoff",
    "survival@boundary",
    "survival@branch,boundary",
    "survival@end",
    "marconi@adaptive",
    "gdsf@adaptive",
    "random@adaptive",
)

_SHARE = re.compile(r", \d+% KV$")
"""End of a trace's name in two pools. Rebuilt systems have none; the bound is that of all bytes."""
COMPARED = (common.DEFAULT, common.LRU)
"""Pairs that are compared on published traces, with intervals over sessions."""


class TraceJob(NamedTuple):
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

    @property
    def spec(self) -> str:
        """Trace with its seed, as ``open_trace`` takes it."""
        return self.path or common.seeded(self.trace, self.seed or 0)

    @property
    def label(self) -> str:
        """Trace with the rate of a closed loop or the share of KV, as the records name it."""
        share = "" if self.kv_share is None else f", {self.kv_share:.0%} KV"
        return self.trace + ("" if self.rate is None else f", {self.rate:g} sessions/s") + share

    @property
    def told(self) -> tuple[str, ...]:
        """Pairs whose records have their sessions."""
        return COMPARED if self.split == "evaluation" and self.seed is None else ()

    @property
    def memory(self) -> dict[str, Any]:
        """Settings of the memory for a simulation."""
        return {"memory": "arena" if self.kv_share is None else "pools", "kv_share": self.kv_share}


def main() -> None:
    parser = common.command_line(__doc__)
    parser.add_argument("--memories", action="store_true", help=f"write {MEMORIES}")
    options = parser.parse_args()
    name, config = MEMORIES if options.memories else NAME, splits_file()
    jobs = [job for split in RESULTS_OF[name] for job in jobs_of(split, config, options.seeds)]
    work = partial(run, config["model"])
    common.run_study(name, work, jobs, losses_table, options.processes)


def splits_file() -> dict[str, Any]:
    """Return the traces, sizes, rates and seeds of this study."""
    return tomllib.loads((ROOT / "experiments" / "splits.toml").read_text())["default-pair"]


def jobs_of(split: str, splits: dict[str, Any], seeds: int) -> Iterator[TraceJob]:
    """Yield the jobs of ``split``, without missing files."""
    if split == "closed loop":
        config = splits["evaluation"]
        for spec, cells in config["closed-loop"].items():
            for seed in config["seeds"][:seeds]:
                yield from (TraceJob(split, spec, seed, (gib,), rate=rate) for gib, rate in cells)
        return
    config = splits[split.removesuffix(POOLS)]
    state_bytes = ModelGeometry.load(splits["model"]).state_bytes
    for kv_share in KV_SHARES if split.endswith(POOLS) else (None,):
        least = 0.0 if kv_share is None else LEAST_STATES * state_bytes / (1 - kv_share)
        for kind in ("gib", "files"):
            for spec, gib in config.get(kind, {}).items():
                fitting = tuple(size for size in gib if budget_bytes(size) >= least)
                path = common.published(spec) if kind == "files" else ""
                if fitting and path is not None:
                    for seed in [None] if path else config["seeds"][:seeds]:
                        yield TraceJob(split, spec, seed, fitting, path, kv_share=kv_share)


def run(model: str, job: TraceJob) -> list[dict[str, Any]]:
    """Return one record per pair and size: of a replay, or of a closed loop."""
    trace, records = open_trace(job.spec).kept(), []
    for pair in PAIRS:
        runs: Sequence[RunResult | ClosedLoopRun]
        if job.rate is None:
            runs = common.replay(trace, job.gib, pair, model=model, **job.memory)
        else:
            runs = common.serve(trace, job.gib, pair, job.rate, job.seed or 0, model=model)
        for gib, one in zip(job.gib, runs, strict=True):
            record = {"split": job.split, "trace": job.label, "gib": gib, "seed": job.seed}
            record |= {"pair": pair, "token_hit_rate": one.token_hit_rate}
            if isinstance(one, ClosedLoopRun):
                record |= {"ttft_mean_s": one.ttft_mean_s, "makespan_s": one.makespan_s}
            elif isinstance(one, RunResult) and pair in job.told:
                tokens = [[of.cached_tokens, of.prompt_tokens] for of in one.by_session]
                record |= {"requests": one.requests, "sessions": tokens}
            records.append(common.rounded(record))
    return records


def pairs_table(records: common.Records, split: str) -> Table:
    """Return one row per pair: hit rate and gain as means over cells, and mean TTFT if known."""
    records = [r for r in records if r["split"] == split and r["seed"] is not None]
    if not records:
        raise FileNotFoundError(f"{NAME}.jsonl has no records of the split {split}")
    by_pair = common.grouped(records, "pair")
    means = {pair: common.rates(of) for pair, of in by_pair.items()}
    reference = common.DEFAULT if common.DEFAULT in means else next(iter(means))
    columns = [Column("eviction@placement"), Column("token hit rate", "%")]
    columns.append(Column(f"gain over `{reference}`", "points"))
    ranked = sorted(means, key=lambda pair: -fmean(means[pair]))
    rows: list[list[Cell]] = [
        [f"`{pair}`", interval(means[pair]), paired(means[pair], means[reference])]
        for pair in ranked
    ]
    if split == "closed loop":
        columns += [Column("mean TTFT", "ratio", ".2f")]
        columns += [Column(name, form=".2f") for name in ("lowest", "highest")]
        ttfts = {
            pair: [
                fmean(run["ttft_mean_s"] for run in of)
                for of in common.grouped(runs, "trace").values()
            ]
            for pair, runs in by_pair.items()
        }
        for pair, row in zip(ranked, rows, strict=True):
            cells = [one / ours for one, ours in zip(ttfts[pair], ttfts[reference], strict=True)]
            row += geometric_mean(cells), min(cells), max(cells)
    return Table(columns, rows)


def _groups(split: str, *, is_generated: bool, is_seen: bool) -> list[str]:
    """Return the rows of the table that contain a cell."""
    if not split.startswith("evaluation"):
        return [split]
    group = f"{split}, {'generated' if is_generated else 'published traces'}"
    return [group] if is_seen else [group, f"{group}, unseen"]


def _known(
    cells: Mapping[tuple[str, Any, float], Mapping[str, float]],
    split: str,
    trace: str,
    seed: int | None,
    gib: float,
) -> tuple[float, ...]:
    """Return the best rebuilt system and the bound of a cell: NaN if they have none, and nothing if
    they were not run."""
    if split.endswith(OVER_SIZES):
        return math.nan, math.nan
    cell = cells.get((_SHARE.sub("", trace), seed, gib))
    if cell is None:
        return ()
    return math.nan if split.endswith(POOLS) else cell[common.BEST_REBUILT], cell[common.BOUND]


def losses_table(
    records: common.Records, cells: Mapping[tuple[str, Any, float], Mapping[str, float]] = {}
) -> Table:
    """Return the loss of the default pair to the best pair of each cell, in points, and its mean
    hit rate next to those of ``cells`` (``yardsticks.by_cell``), where they were run."""
    records = [*records, *_over_sizes(records)]
    seen = splits_file()["evaluation"]["seen"]
    generated = {record["trace"] for record in records if record["seed"] is not None}
    found: dict[str, list[list[float]]] = {}
    hits: dict[str, list[tuple[float, ...]]] = {}
    for (split, trace, gib), runs in common.grouped(records, "split", "trace", "gib").items():
        of = common.grouped(runs, "pair")
        rates = {pair: [100 * run["token_hit_rate"] for run in each] for pair, each in of.items()}
        best, ours = max(rates.values(), key=fmean), rates[common.DEFAULT]
        losses = [one - other for one, other in zip(best, ours, strict=True)]
        known = [_known(cells, split, trace, run["seed"], gib) for run in of[common.DEFAULT]]
        pairs = zip(ours, rates[common.LRU_ADAPTIVE], known, strict=True)
        measured = [(one, other, *of_cell) for one, other, of_cell in pairs if of_cell]
        is_seen = trace.partition(", ")[0] in seen
        for group in _groups(split, is_generated=trace in generated, is_seen=is_seen):
            found.setdefault(group, []).append(losses)
            hits.setdefault(group, []).extend(measured)
    rows = []
    for group, losses_of in found.items():
        means = [fmean(losses) for losses in losses_of]
        over_seeds = [fmean(losses) for losses in zip(*losses_of, strict=True)]
        near = sum(mean <= 0.5 for mean in means)
        row = [group, len(means), interval(over_seeds), max(means), f"{near} of {len(means)}"]
        means_of = [*map(fmean, zip(*hits[group], strict=True))] or [math.nan] * 4
        rows.append([*row, *(None if math.isnan(rate) else rate for rate in means_of)])
    columns = [Column("cells"), Column("number", form="d"), Column("mean loss", "points")]
    columns += [Column("worst cell", "points"), Column("within 0.5 points")]
    columns += [Column("hits: default pair", "%")]
    return Table([*columns, *common.references()], rows)


def _over_sizes(records: common.Records) -> list[dict[str, Any]]:
    """Return the mean hit rate over the sizes of each outside trace, memory and pair."""
    outside = [record for record in records if record["split"].startswith("outside")]
    return [
        {"split": split + OVER_SIZES, "trace": trace, "gib": None, "seed": None, "pair": pair}
        | {"token_hit_rate": fmean(record["token_hit_rate"] for record in of)}
        for (split, trace, pair), of in common.grouped(outside, "split", "trace", "pair").items()
    ]


def published_table(records: common.Records) -> Table:
    """Return both rates and the gain on the published traces, with intervals over sessions."""
    rows = []
    files = [record for record in records if record["seed"] is None]
    for (trace, gib), runs in common.grouped(files, "trace", "gib").items():
        pairs = {run["pair"]: run for run in runs}
        ours, lru = (pairs[pair] for pair in COMPARED)
        rates = [100 * record["token_hit_rate"] for record in (ours, lru)]
        num_sessions = "unknown" if "sessions" in ours else "-"
        figures: list[Cell] = [*rates, rates[0] - rates[1]]
        # Sessions are unknown if there is one per request.
        if len(ours.get("sessions", ())) < ours.get("requests", 0):
            prompts = [prompt for _, prompt in ours["sessions"]]
            reused = [[cached for cached, _ in record["sessions"]] for record in (ours, lru)]
            saved = [one - other for one, other in zip(*reused, strict=True)]
            num_sessions = str(len(prompts))
            figures = [ratio(part, prompts).scaled(100) for part in (*reused, saved)]
        name = Path(trace.partition("?")[0]).name.partition(".")[0]
        rows.append([f"`{name}`", gib, num_sessions, *figures])
    columns = [Column("trace"), Column("GiB", form="g"), Column("sessions")]
    columns += [Column("hits: default pair", "%"), Column("LRU with fixed rules", "%")]
    return Table([*columns, Column("gain", "points")], rows)


if __name__ == "__main__":
    main()
