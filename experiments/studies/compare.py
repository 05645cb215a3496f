"""Compare variants of one scenario: checkpoint grids, kinds of memory, information in requests, and
conditions of use.

    python -m experiments.studies.compare grid [--seeds 5] [--processes 2]
    python -m experiments.studies.compare arena [--traces chat agent]
    python -m experiments.studies.compare hints
    python -m experiments.studies.compare stop-reasons
    python -m experiments.studies.compare conditions

- ``grid``: grids of 64, 32, 16 and 1 tokens, default policies. Gains are paired by seed. No kernel
  has a grid of 1. `docs/engine/steps.md` has the cost of the other grids.
- ``arena``: the arena, in which a state takes whole rows, and an ideal budget of bytes, default
  policies. In a short trace, one more state changes all later decisions, so a single size says
  little: the figure is the mean difference over the sizes of a workload, with an interval over
  seeds.
- ``hints``: requests with their boundaries and without: the advantage over a rebuilt system
  that gets none, in every cell of the evaluation split.
- ``stop-reasons``: published agent traces with the stop reasons of answers and without.
  ``splits.toml`` declares sizes and seeds. A trace with a missing file is skipped.
- ``conditions``: the pairs of policies, rebuilt systems and the bound, while one condition changes:
  tenants without shared prefixes, arrivals, running requests, model (a state has the bytes of 7 to
  8,000 tokens of KV). Memory is short in every row. Rows of two conditions cannot be compared.
"""

from __future__ import annotations

import heapq
import tomllib
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from experiments.provenance import ROOT
from experiments.studies import common
from experiments.studies.common import grouped, rates, rounded
from experiments.tables import Column, Table
from hybridcache import ModelGeometry, Trace, TraceRequest, open_trace
from hybridcache.lab.board import Split
from hybridcache.lab.traces.intervals import interval, paired
from hybridcache.lab.traces.trace import Held

Settings = Mapping[str, Any]
Record = dict[str, Any]


class TraceCase(NamedTuple):
    """One trace with one seed: fields of its records, requests, sizes and settings."""

    fields: Record
    open: Callable[[], Trace]
    gib: tuple[float, ...]
    settings: Settings


GRIDS = (64, 32, 16, 1)
common.WORKLOADS.setdefault("tree-of-thoughts", common.Workload("tree-of-thoughts", "0.5:16:15"))
TRACES = {
    "grid": ("tree-of-thoughts", "short", "few-shot", "branch", "chat"),
    "arena": tuple(name for name in common.WORKLOADS if name != "tree-of-thoughts"),
}
"""Workloads of the studies of one."""
LEFT_OUT: dict[str, tuple[str, Record]] = {
    "hints": ("hints", {"boundaries": ()}),
    "stop-reasons": ("stop_reasons", {"stop_reason": ""}),
}
"""Name of an information in the records, and the fields of requests without it, by study."""


def measure_grid(job: tuple[str, int]) -> list[Record]:
    """Return one record per grid and size of (trace, seed)."""
    name, seed = job
    workload = common.WORKLOADS[name]
    trace, gib = workload.open(name, seed).kept(), workload.sizes(3)
    return [
        {"trace": name, "seed": seed, "grid": grid}
        | rounded({"gib": run.gib, "token_hit_rate": run.token_hit_rate})
        for grid in GRIDS
        for run in common.replay(trace, gib, model=workload.geometry, grid=grid)
    ]


def measure_arena(job: tuple[str, int]) -> list[Record]:
    """Return one record per size of (trace, seed)."""
    name, seed = job
    workload, records = common.WORKLOADS[name], list[Record]()
    trace, gib = workload.open(name, seed).kept(), workload.sizes(5)
    settings: dict[str, Any] = {"model": workload.geometry, "grid": workload.grid}
    both = (common.replay(trace, gib, memory=of, **settings) for of in ("moves", "budget"))
    for arena, ideal in zip(*both, strict=True):
        assert arena.moved_slabs is not None and arena.moved_kv_bytes is not None
        record = {
            "trace": name,
            "seed": seed,
            "grid": workload.grid,
            "gib": arena.gib,
            "requests": arena.requests,
            "token_hit_rate": arena.token_hit_rate,
            "budget": ideal.token_hit_rate,
            "points": 100 * (arena.token_hit_rate - ideal.token_hit_rate),
            "slabs_moved_per_request": arena.moved_slabs / arena.requests,
            "kv_moved_per_kv_written": arena.moved_kv_bytes / max(arena.written_kv_bytes or 0, 1),
        }
        records.append(rounded(record))
    return records


def measure_left_out(study: str, case: TraceCase, pair: str = common.DEFAULT) -> list[Record]:
    """Return one record per size, with an information in the requests and without."""
    name, without = LEFT_OUT[study]
    trace = case.open().kept()
    poorer = replace(trace, source=Held(tuple(one._replace(**without) for one in trace)))
    both = (common.replay(one, case.gib, pair, **case.settings) for one in (trace, poorer))
    return [
        case.fields | {"gib": gib}
        | rounded({f"with_{name}": one.token_hit_rate, f"without_{name}": other.token_hit_rate})
        for gib, one, other in zip(case.gib, *both, strict=True)
    ]  # fmt: skip


def measure_hints(job: tuple[str, int]) -> list[Record]:
    """Return one record per pair and size of (trace, seed)."""
    (name, seed), split = job, Split.load()
    [sizes] = [cell.sizes for cell in split.cells if cell.name == name]
    assert not isinstance(sizes, str)
    opened = partial(open_trace, common.seeded(name, seed))
    case = TraceCase({"trace": name, "seed": seed}, opened, sizes, {"model": split.model})
    return [
        {name: one[name] for name in ("trace", "seed", "gib")} | {"pair": pair} | one
        for pair, policies in common.PAIRS.items()
        for one in measure_left_out("hints", case, policies)
    ]


def declared() -> Record:
    """Return the traces, sizes and seeds of the comparison of stop reasons."""
    splits = (ROOT / "experiments" / "splits.toml").read_text(encoding="utf-8")
    return tomllib.loads(splits)["stop-reasons"]


def measure_stop_reasons(job: tuple[str, int | None, tuple[float, ...]]) -> list[Record]:
    """Return one record per size of (trace, seed, sizes), for the default pair."""
    name, seed, gib = job
    opened = partial(common.opened, name, seed or 0)
    case = TraceCase({"trace": name, "seed": seed}, opened, gib, {"model": declared()["model"]})
    return measure_left_out("stop-reasons", case)


# --- Conditions -----------------------------------------------------------------------------------

SEEDS = range(100, 105)
"""Seeds of the evaluation split."""
MODEL = "qwen3-next"
CHATS = "conversations?live=24&num_conversations=120&seed={}"
MODELS = ("LFM2-1.2B", "Olmo-Hybrid-7B", "Qwen3.5-4B", MODEL, "Nemotron-3-Nano-30B-A3B")
MIXES = {
    "4 tenants, a kind of work each": ("chat", "agent", "few-shot", "short"),
    "4 tenants, all chats": ("chat",) * 4,
}
RUNNING = (1, 16, 64)
ARRIVALS = ("fixed", "poisson", "bursts:16")
COLUMNS = common.PAIRS | {name: name for name in (common.BEST_REBUILT, common.BOUND)}
MEASURED = common.PAIRS | {name: name for name in (*common.REBUILT, common.BOUND)}
"""Pairs, rebuilt systems and the bound by their name in the records."""


def tenants(kinds: tuple[str, ...], seed: int) -> Trace:
    """Return traces of equal duration, merged by time, each with a separate namespace."""

    def requests_of(tenant: int, kind: str) -> list[TraceRequest]:
        requests = tuple(open_trace(f"{kind}?seed={len(kinds) * seed + tenant}"))
        last_s = max(request.timestamp_s for request in requests)
        return [
            request._replace(
                timestamp_s=request.timestamp_s / last_s,
                session=(tenant, request.session),
                namespace=tenant,
            )
            for request in requests
        ]

    parts = [requests_of(tenant, kind) for tenant, kind in enumerate(kinds)]
    return Trace("tenants", 1, lambda: heapq.merge(*parts, key=lambda request: request.timestamp_s))


def conditions(seed: int) -> Iterator[TraceCase]:
    """Yield the case of each row. Settings with a rate are those of a closed loop."""

    def case(
        condition: str, value: str, opened: Callable[[], Trace], gib: float, **settings: Any
    ) -> TraceCase:
        fields = {"condition": condition, "value": value, "seed": seed}
        return TraceCase(fields, opened, (gib,), {"model": MODEL} | settings)

    for label, kinds in MIXES.items():
        yield case("tenants", label, partial(tenants, kinds, seed), 12)
    chats, served = partial(open_trace, CHATS.format(seed)), {"seed": seed}
    for starts in ARRIVALS:
        yield case("arrivals", starts, chats, 4, rate=0.5, starts=starts, **served)
    for count in RUNNING:
        yield case("running at once", str(count), chats, 8, rate=4, max_running=count, **served)
    first = ModelGeometry.preset(MODEL).kv_bytes_per_token
    for model in MODELS:
        geometry = ModelGeometry.preset(model)
        worth = f"{geometry.state_tokens:,.0f} ({model})"
        gib = 3 * geometry.kv_bytes_per_token / first  # for the same number of KV tokens
        chat = partial(open_trace, f"chat?seed={seed}")
        yield case("tokens that a state is worth", worth, chat, gib, model=model)


def measure_conditions(job: tuple[int, int]) -> list[Record]:
    """Return one record per pair, rebuilt system and bound of (row, seed)."""
    row, seed = job
    case = list(conditions(seed))[row]
    return [
        case.fields | {"pair": name, "token_hit_rate": rounded(rate)}
        for name, pair in MEASURED.items()
        for rate in common.hit_rates(case.open(), case.gib, pair, **case.settings)
    ]


# --- Tables ---------------------------------------------------------------------------------------


def grid_table(records: common.Records) -> Table:
    """Return the hit rate with the first grid, and the gains of the others."""
    first, *others = GRIDS
    rows = []
    ordered = sorted(records, key=lambda record: (record["gib"], record["seed"]))
    for name, of in grouped(ordered, "trace").items():
        for gib, cells in grouped(of, "gib").items():
            gains = [paired(rates(cells, grid=grid), rates(cells, grid=first)) for grid in others]
            rows.append([name, gib, interval(rates(cells, grid=first)), *gains])
    columns = [Column("trace"), Column("GiB", form=".3g"), Column(f"grid {first}", "%")]
    return Table([*columns, *(Column(f"gain of {one}", "points") for one in others)], rows)


def arena_table(records: common.Records) -> Table:
    """Return the mean difference, the extremes of its cells, and KV moved."""
    rows = []
    for name, cells in grouped(records, "trace").items():
        points = [cell["points"] for cell in cells]
        moved = max(100 * cell["kv_moved_per_kv_written"] for cell in cells)
        means = rates(cells, "points", 1)
        size = len(cells) // len(means)
        rows.append([name, size, interval(means), min(points), max(points), moved])
    columns = [Column("trace"), Column("sizes", form="d")]
    columns += [Column("arena less ideal", "points", ".2f"), Column("lowest", "points", "+.2f")]
    return Table([*columns, Column("highest", "points", "+.2f"), Column("KV moved", "%")], rows)


def hints_table(records: common.Records) -> Table:
    """Return one row per pair: hit rate with hints and the gain from them, in percent,
    over seeds."""
    rows = []
    for pair, cells in grouped(records, "pair").items():
        informed, plain = (rates(cells, key) for key in ("with_hints", "without_hints"))
        rows.append([pair, interval(informed), paired(informed, plain)])
    columns = [Column("pair"), Column("token hit rate with hints", "%")]
    return Table([*columns, Column("gain from hints", "points")], rows)


def conditions_table(records: common.Records) -> Table:
    """Return one row per condition: rates in percent, and the gain of the default pair
    over LRU with fixed rules. The best rebuilt system is that of each seed."""
    rows = []
    ours, _, lru = common.PAIRS
    for (condition, value), cells in grouped(records, "condition", "value").items():
        found = {pair: rates(cells, pair=pair) for pair in MEASURED}
        peers = [found[name] for name in common.REBUILT if found[name]]
        found[common.BEST_REBUILT] = [max(of) for of in zip(*peers, strict=True)]
        shown = [interval(found[name]) if found[name] else None for name in COLUMNS]
        gain = paired(found[ours], found[lru])
        rows.append([condition, value + " at once" * value.isdecimal(), *shown, gain])
    columns = [Column(name, "%", reference=of) for name, of in COLUMNS.items()]
    return Table([Column("condition"), Column("value"), *columns, Column("gain", "points")], rows)


# --- Studies --------------------------------------------------------------------------------------


def _hints_jobs(options: Namespace) -> list[Any]:
    split = Split.load().subset(num_seeds=options.seeds)
    return [(cell.name, seed) for cell in split.cells for seed in split.seeds]


def _stop_reasons_jobs(_: Namespace) -> list[Any]:
    return [
        (file["trace"], seed, tuple(file["gib"]))
        for file in declared()["file"]
        for seed in file.get("seeds", (None,))
        if common.published(file["trace"]) is not None
    ]


def _conditions_jobs(options: Namespace) -> list[Any]:
    seeds = SEEDS[: options.seeds]
    return [(row, seed) for row in range(len([*conditions(0)])) for seed in seeds]


class Study(NamedTuple):
    """One comparison: function of a job, function of all jobs, and table."""

    measure: Callable[[Any], common.Records]
    jobs: Callable[[Namespace], list[Any]]
    table: Callable[[common.Records], Table]


STUDIES = {
    "grid": Study(measure_grid, common.cells_of, grid_table),
    "arena": Study(measure_arena, common.cells_of, arena_table),
    "hints": Study(measure_hints, _hints_jobs, hints_table),
    "stop-reasons": Study(measure_stop_reasons, _stop_reasons_jobs, common.plain_table),
    "conditions": Study(measure_conditions, _conditions_jobs, conditions_table),
}


def main() -> None:
    parser = common.command_line(__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--traces", nargs="+", choices=common.WORKLOADS)
    options = parser.parse_args()
    options.traces = options.traces or TRACES.get(options.study, ())
    study = STUDIES[options.study]
    file = f"study_{options.study.replace('-', '_')}"
    common.run_study(file, study.measure, study.jobs(options), study.table, options.processes)


if __name__ == "__main__":
    main()
