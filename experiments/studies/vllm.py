"""Compare vLLM's own scheduler as it is, with its best flags, and with HybridScheduler.

`python -m experiments.studies.vllm` writes study_vllm.jsonl. It needs vLLM, as `make vllm` installs
it. Schedulers, block pools and cache managers are vLLM's; the worker computes no tokens and checks
all contents (hybridcache.vllm.check). The model is Qwen3-Next: blocks of 1,056 tokens. Each session
sends its next request at once. `--review` runs only the cells that were published first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

from experiments.studies import common
from experiments.tables import Column, Table
from hybridcache import open_trace

CONVERSATIONS = "conversations?num_conversations=60&turns=10&live=24"
SHAREGPT = "sharegpt-like?requests=500&sessions=150"
TOGETHER, ALONE = 16, 1
"""Sessions at once."""


class Workload(NamedTuple):
    """One trace and three sizes in GiB."""

    spec: str
    gib: tuple[float, float, float]
    review: dict[int, tuple[float, ...]]
    """Sizes that were published first, by sessions at once."""
    has_seeds: bool = True


WORKLOADS = {
    "chat": Workload("chat", (4, 6, 8), {TOGETHER: (4, 8), ALONE: (4, 8)}),
    "agent": Workload("agent", (3, 4.5, 6), {TOGETHER: (3, 6), ALONE: (3, 6)}),
    "conversations": Workload(CONVERSATIONS, (4, 6, 10), {TOGETHER: (4, 10), ALONE: (4, 10)}),
    "toolbench-dfs": Workload(
        "toolbench-dfs", (1, 2, 4), {TOGETHER: (4,), ALONE: (1, 4)}, has_seeds=False
    ),
    "sharegpt-like": Workload(SHAREGPT, (4, 8, 16), {TOGETHER: (16,), ALONE: (4, 16)}),
    "oasst-trees": Workload(
        "oasst-trees", (2, 4, 8), {TOGETHER: (8,), ALONE: (2, 8)}, has_seeds=False
    ),
    "tree-search": Workload("tree-search", (1, 2, 4), {ALONE: (1, 4)}),
    "few-shot": Workload("few-shot", (1, 2, 4), {}),
    "branch": Workload("branch", (1, 2, 4), {}),
    "resend": Workload("resend", (1, 2, 4), {}),
    "short": Workload("short", (1, 2, 4), {}),
}
AS_IS = "as it is"
FLAGS: dict[str, dict[str, Any]] = {
    "--prefix-match-unit 32": {"unit": 32},
    "--prefix-cache-retention-interval none": {"unit": 0, "retention": None},
}
OURS = "HybridScheduler"
EVICTION_ONLY = "eviction only"
"""HybridScheduler without a match unit, so that its places are ends of whole blocks."""
VARIANTS: dict[str, dict[str, Any]] = {
    AS_IS: {"scheduler": "vllm", "unit": 0},
    **{flag: {"scheduler": "vllm", **options} for flag, options in FLAGS.items()},
    OURS: {},
    EVICTION_ONLY: {"unit": 0, "settings": {"placement": "branch,backoff,end"}},
}


class Job(NamedTuple):
    """One run."""

    trace: str
    gib: float
    sessions: int
    seed: int
    variant: str


def jobs_of(seeds: int, review: bool, variants: Sequence[str]) -> Iterator[Job]:
    """Yield all runs, those of the review first."""
    done = set()
    for sessions in (TOGETHER, ALONE):
        for trace, workload in WORKLOADS.items():
            for gib in workload.review.get(sessions, ()):
                done.add((trace, gib, sessions, 0))
    for trace, workload in () if review else WORKLOADS.items():
        for seed in range(seeds if workload.has_seeds else 1):
            done.update((trace, gib, TOGETHER, seed) for gib in workload.gib)
    for cell in sorted(done, key=lambda cell: (cell[3], -cell[2], [*WORKLOADS].index(cell[0]))):
        for variant in variants:
            yield Job(*cell, variant)


def measure(job: Job) -> common.Records:
    """Run one variant of one cell."""
    from hybridcache.vllm.check import Options, run  # Imported here: it imports vLLM.

    spec = WORKLOADS[job.trace].spec
    trace = open_trace(common.seeded(spec, job.seed) if job.seed else spec)
    report = run(trace, job.gib, Options(sessions=job.sessions, **VARIANTS[job.variant]))
    record = asdict(report) | {"hit_rate": report.hit_rate, "num_wrong": report.num_wrong}
    return [job._asdict() | record]


def table(records: common.Records) -> Table:
    """Return a row per cell, as means over seeds: token hit rates, and forward passes."""
    rows = []
    for (trace, gib, sessions), found in common.grouped(
        records, "trace", "gib", "sessions"
    ).items():
        by_variant = common.grouped(found, "variant")
        rates = {
            variant: 100 * fmean(one["hit_rate"] for one in of)
            for variant, of in by_variant.items()
        }
        flags = [rate for variant, rate in rates.items() if variant in FLAGS]
        best = max([rates[AS_IS], *flags]) if AS_IS in rates else None
        ours = rates.get(OURS)
        gain = None if ours is None or best is None else ours - best
        steps = [
            fmean(one["steps"] for one in by_variant[variant]) if variant in by_variant else None
            for variant in (AS_IS, OURS)
        ]
        wrong = sum(one["num_wrong"] for one in by_variant.get(OURS, ()))
        seeds = len({one["seed"] for one in found})
        shown = rates.get(AS_IS), best, rates.get(EVICTION_ONLY), ours, gain
        rows.append([trace, gib, sessions, seeds, *shown, *steps, wrong])
    columns = [
        Column("trace"),
        Column("GiB", form="g"),
        Column("sessions", form="d"),
        Column("seeds", form="d"),
        Column(AS_IS, "%"),
        Column("best of it and two flags", "%"),
        Column(EVICTION_ONLY, "%"),
        Column(OURS, "%"),
        Column("gain over the best", "points"),
        Column("steps as it is", form=".0f"),
        Column("steps", form=".0f"),
        Column("wrong rows and states", form="d"),
    ]
    return Table(columns, rows)


def main() -> None:
    parser = common.command_line(__doc__)
    parser.add_argument("--review", action="store_true", help="only the first published cells")
    parser.add_argument("--cells", nargs="+", metavar="TRACE:GIB:SESSIONS", help="only these")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    options = parser.parse_args()
    jobs = [
        job
        for job in jobs_of(options.seeds, options.review, options.variants)
        if not options.cells or f"{job.trace}:{job.gib:g}:{job.sessions}" in options.cells
    ]
    run = partial(common.run_study, "study_vllm", measure, jobs, table)
    run(options.processes)


if __name__ == "__main__":
    main()
