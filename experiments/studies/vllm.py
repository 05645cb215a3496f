"""Compare vLLM's own scheduler as it is, with its best flags, and with HybridScheduler.

`python -m experiments.studies.vllm` writes study_vllm.jsonl. It needs vLLM, as `make vllm` installs
it. Schedulers, block pools and cache managers are vLLM's; the worker computes no tokens and checks
all contents (hybridcache.vllm.check). The model is Qwen3-Next: blocks of 1,056 tokens. Each session
sends its next request at once. In other cells both schedulers have host memory, or more sessions
are served than fit. A run that was stopped is continued by the same command.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import asdict
from functools import partial
from itertools import count
from statistics import fmean
from typing import Any, NamedTuple

from experiments import provenance
from experiments.provenance import resumed
from experiments.studies import common
from experiments.tables import Cell, Column, Table
from hybridcache import open_trace

CONVERSATIONS = "conversations?num_conversations=60&turns=10&live=24"
SHAREGPT = "sharegpt-like?requests=500&sessions=150"
TOGETHER, ALONE = 16, 1
"""Sessions at once."""


class SizedTrace(NamedTuple):
    """One trace and its sizes in GiB."""

    spec: str
    gib: tuple[float, ...]
    review: dict[int, tuple[float, ...]]
    """Sizes that were published first, by sessions at once."""
    has_seeds: bool = True
    calls: int = 1 << 30
    """First requests of each session that are served."""


WORKLOADS = {
    "chat": SizedTrace("chat", (4, 6, 8), {TOGETHER: (4, 8), ALONE: (4, 8)}),
    "agent": SizedTrace("agent", (3, 4.5, 6), {TOGETHER: (3, 6), ALONE: (3, 6)}),
    "conversations": SizedTrace(CONVERSATIONS, (4, 6, 10), {TOGETHER: (4, 10), ALONE: (4, 10)}),
    "toolbench-dfs": SizedTrace(
        "toolbench-dfs", (1, 2, 4), {TOGETHER: (4,), ALONE: (1, 4)}, has_seeds=False
    ),
    "sharegpt-like": SizedTrace(SHAREGPT, (4, 8, 16), {TOGETHER: (16,), ALONE: (4, 16)}),
    "oasst-trees": SizedTrace(
        "oasst-trees", (2, 4, 8), {TOGETHER: (8,), ALONE: (2, 8)}, has_seeds=False
    ),
    "tree-search": SizedTrace("tree-search", (1, 2, 4), {ALONE: (1, 4)}),
    "few-shot": SizedTrace("few-shot", (1, 2, 4), {}),
    "branch": SizedTrace("branch", (1, 2, 4), {}),
    "resend": SizedTrace("resend", (1, 2, 4), {}),
    "short": SizedTrace("short", (1, 2, 4), {}),
    "phased-heads": SizedTrace("phased-heads", (1, 2, 4), {}),
}
AGENTS = "live-agents?live=16&sessions=20&shortest=8000&longest=16000"
OVERLOAD = {
    "long agents": SizedTrace(AGENTS, (1.5, 2, 3, 4), {}),
    "mini-swe-agent": SizedTrace("mini-swe-agent", (1, 1.5, 2, 2.5), {}, False, calls=12),
    "append-only-chat": SizedTrace("append-only-chat", (1.5, 3), {}),
    "chat in overload": SizedTrace("chat", (2, 3), {}),
}
"""Cells in which 1.2 to 4 times as many sessions are served as fit."""
AS_IS = "as it is"
FLAGS: dict[str, dict[str, Any]] = {
    "--prefix-match-unit 32": {"unit": 32},
    "--prefix-cache-retention-interval none": {"unit": 0, "retention": None},
}
OURS = "HybridScheduler"
WHOLE_BLOCKS, EVICTION_ONLY = "no match unit", "eviction only"
"""HybridScheduler without the flag, so that its places are ends of whole blocks, and the same with
fixed places."""
IN_BLOCKS = (WHOLE_BLOCKS, EVICTION_ONLY)
"""Variants that are run only in the cells with several sessions that were published first."""
FIXED = "fixed places"
"""HybridScheduler without learning, in the cells of ``OVERLOAD``."""
VARIANTS: dict[str, dict[str, Any]] = {
    AS_IS: {"scheduler": "vllm", "unit": 0},
    **{flag: {"scheduler": "vllm", **options} for flag, options in FLAGS.items()},
    OURS: {},
    WHOLE_BLOCKS: {"unit": 0},
    EVICTION_ONLY: {"unit": 0, "settings": {"placement": "branch,backoff,end"}},
    FIXED: {"settings": {"placement": "branch,backoff,end"}},
}
HOST = (1, 3)
"""Host memory as multiples of the device's, in the cells with several sessions."""
CONNECTORS = {
    AS_IS: {"kv_connector": "OffloadingConnector"},
    OURS: {
        "kv_connector": "HybridOffloadingConnector",
        "kv_connector_module_path": "hybridcache.vllm.connector",
    },
}


def with_host(variant: str, multiple: int) -> str:
    """Return the name of a variant with host memory."""
    return f"{variant}, {multiple} times the memory on the host"


SERIES = (AS_IS, "best of two flags", OURS)
HITS = f"{', '.join(SERIES)}: %"


class VllmRun(NamedTuple):
    """One run."""

    trace: str
    gib: float
    sessions: int
    seed: int
    variant: str


def jobs_of(seeds: int) -> Iterator[VllmRun]:
    """Yield all runs. Those of the first seed come first, and of these the published ones."""
    published = [
        (trace, gib, sessions, 0)
        for sessions in (TOGETHER, ALONE)
        for trace, workload in WORKLOADS.items()
        for gib in workload.review.get(sessions, ())
    ]
    others = [
        (trace, gib, TOGETHER, seed)
        for seed in range(seeds)
        for trace, workload in (WORKLOADS | OVERLOAD).items()
        for gib in (workload.gib if workload.has_seeds or not seed else ())
    ]
    cells = dict.fromkeys([*published, *others])
    for cell in sorted(cells, key=lambda cell: (cell[3], cell[2] == ALONE)):
        is_first = cell in published and cell[2] == TOGETHER
        is_overload = cell[0] in OVERLOAD
        for variant in VARIANTS:
            if is_overload if variant == FIXED else is_first or variant not in IN_BLOCKS:
                yield VllmRun(*cell, variant)
        if cell[2] == TOGETHER and not is_overload:
            for multiple in HOST:
                yield from (VllmRun(*cell, with_host(one, multiple)) for one in CONNECTORS)


def measure(job: VllmRun) -> dict[str, Any]:
    """Run one variant of one cell."""
    from hybridcache.vllm.check.engine import Options, run  # Imported here: it imports vLLM.

    spec, *_, calls = (WORKLOADS | OVERLOAD)[job.trace]
    trace = open_trace(common.seeded(spec, job.seed) if job.seed else spec)
    number: defaultdict[Any, count[int]] = defaultdict(count)
    name, _, host = job.variant.partition(", ")
    options = dict(VARIANTS[name if host else job.variant])
    if host:
        num_bytes = int(job.gib * int(host.split()[0]) * 2**30)
        extra = {"kv_connector_extra_config": {"cpu_bytes_to_use": num_bytes}}
        options["kv_transfer_config"] = CONNECTORS[name] | extra
    requests = [one for one in trace if one.session is None or next(number[one.session]) < calls]
    report = run(requests, Options(job.gib, sessions=job.sessions, **options))
    record = asdict(report) | {"hit_rate": report.hit_rate, "num_wrong": report.num_wrong}
    return job._asdict() | record


PLACE = Column("trace"), Column("GiB", form="g"), Column("seeds", form="d")
"""First columns of each table."""


def complete(
    records: common.Records, variants: Collection[str], sessions: int = TOGETHER
) -> dict[tuple[str, float], list[dict[str, Any]]]:
    """Return the runs by variant of each seed that has all ``variants``, by cell of ``WORKLOADS``
    with ``sessions`` at once, in that order."""
    cells: dict[tuple[str, float], list[dict[str, Any]]] = {}
    groups = common.grouped(records, "trace", "gib", "sessions", "seed")
    for (trace, gib, at_once, _), of in groups.items():
        runs = {one["variant"]: one for one in of}
        if at_once == sessions and trace in WORKLOADS and runs.keys() >= {*variants}:
            cells.setdefault((trace, gib), []).append(runs)
    order = [(name, gib) for name, workload in WORKLOADS.items() for gib in workload.gib]
    return dict(sorted(cells.items(), key=lambda cell: order.index(cell[0])))


def table(records: common.Records, sessions: int = TOGETHER) -> Table:
    """Return a row per cell with ``sessions`` at once, as means over the seeds that have all flags:
    token hit rates, and forward passes."""
    cells = complete(records, {AS_IS, OURS, *FLAGS}, sessions)

    def mean(found: list[dict[str, Any]], variant: str, field: str) -> float | None:
        known = [runs[variant][field] for runs in found if variant in runs]
        return fmean(known) if known else None

    rows: list[list[Cell]] = []
    for (trace, gib), found in cells.items():
        rates = {name: mean(found, name, "hit_rate") for name in VARIANTS}
        percent = {name: 100 * rate for name, rate in rates.items() if rate is not None}
        best = max(percent[name] for name in (AS_IS, *FLAGS))
        ours = percent[OURS]
        wrong = sum(runs[name]["num_wrong"] for runs in found for name in runs)
        rows.append([
            trace, gib, len(found), [percent[AS_IS], best, ours], ours - percent[AS_IS],
            ours - best, *(percent.get(name) for name in IN_BLOCKS),
            [mean(found, AS_IS, "steps"), mean(found, OURS, "steps")], wrong,
        ])  # fmt: skip
    columns = [*PLACE, Column(HITS)]
    columns += [Column(name, "points") for name in ("gain", "gain over the best")]
    columns += [Column(f"{name}, first seed", "%") for name in IN_BLOCKS]
    columns += [Column("forward passes: as it is, ours", form=".0f"), Column("wrong", form="d")]
    return Table(columns, rows)


def overload_table(records: common.Records) -> Table:
    """Return a row per cell of ``OVERLOAD``, as means over the seeds: token hit rates, tokens that
    are computed, preempted requests included, forward passes, and the time model's time to the
    first token."""
    cells = common.grouped([one for one in records if one["trace"] in OVERLOAD], "trace", "gib")
    if not cells:
        raise FileNotFoundError("cells in overload of study_vllm.jsonl")
    rows: list[list[Cell]] = []
    for (trace, gib), found in cells.items():
        of = common.grouped(found, "variant")

        def mean(field: str, scale: float, *names: str, of: Any = of) -> list[float]:
            return [scale * fmean(one[field] for one in of[name]) for name in names]

        hits = mean("hit_rate", 100, AS_IS, *FLAGS, FIXED, OURS)
        ttft = mean("ttft_mean_s", 1e3, AS_IS, OURS)
        both = [("computed_tokens", 1e-3), ("steps", 1), ("ttft_p95_s", 1e3)]
        rows.append([
            trace, gib, len(of[OURS]), [hits[0], max(hits[:3]), *hits[3:]], hits[-1] - hits[0],
            *(mean(field, scale, AS_IS, OURS) for field, scale in both), ttft,
            100 * (ttft[1] / ttft[0] - 1), sum(one["num_wrong"] for one in found),
        ])  # fmt: skip
    pair = f"{AS_IS}, ours"
    heads = "thousands of computed tokens", "forward passes", "95 % of TTFT, ms", "mean TTFT, ms"
    columns = [*PLACE, Column(f"{AS_IS}, best of two flags, {FIXED}, ours: %")]
    columns += [
        Column("gain", "points"),
        *(Column(f"{head}: {pair}", form=".0f") for head in heads),
    ]
    columns += [Column("change of the mean TTFT", "%"), Column("wrong", form="d")]
    return Table(columns, rows)


def host_table(records: common.Records) -> Table:
    """Return a row per cell with host memory, as means over the seeds that have all variants: token
    hit rates, the gain over vLLM with the same host memory, and wrong rows and states."""
    names = [with_host(one, multiple) for multiple in HOST for one in CONNECTORS]
    if not (cells := complete(records, {OURS, *names})):
        raise FileNotFoundError("cells with host memory of study_vllm.jsonl")
    rows: list[list[Cell]] = []
    for (trace, gib), found in cells.items():
        percent = {
            name: 100 * fmean(runs[name]["hit_rate"] for runs in found) for name in (OURS, *names)
        }
        pairs = [[percent[with_host(one, multiple)] for one in CONNECTORS] for multiple in HOST]
        wrong = sum(runs[name]["num_wrong"] for runs in found for name in names)
        gains = [ours - theirs for theirs, ours in pairs]
        rows.append([trace, gib, len(found), percent[OURS], *pairs, *gains, wrong])
    columns = [*PLACE, Column(f"{OURS} without it", "%")]
    columns += [Column(f"{one} times, {AS_IS}, {OURS}: %", form=".1f") for one in HOST]
    columns += [Column(f"gain with {one} times", "points") for one in HOST]
    return Table([*columns, Column("wrong", form="d")], rows)


def main() -> None:
    options = common.command_line(__doc__, seeds=3).parse_args()
    jobs = {" ".join(map(str, job)): job for job in jobs_of(options.seeds)}
    file = provenance.WRITTEN / "study_vllm.jsonl"
    settings = {"code": provenance.code_hash(["hybridcache"])}
    run = partial(common.measured, measure, processes=options.processes)
    records = resumed(file, settings, jobs, run)
    print(table(records), table(records, ALONE), sep="\n")
    print(overload_table(records), host_table(records), sep="\n")


if __name__ == "__main__":
    main()
