"""Measure the gain from boundary hints and stop reasons, which rebuilt systems do not get.

    python -m experiments.studies.hints [--seeds 5] [--processes 2]
    python -m experiments.studies.hints --stop-reasons

A request may name boundaries: positions between parts of its prompt, such as messages. Placements
can save a checkpoint there. Every cell of the evaluation split is replayed with and without these
hints, by the default pair and by LRU with fixed rules. The difference, paired by seed, is the
advantage over a rebuilt system that comes from the hints.

The engine also has the stop reason of an answer: a tool call, or the end of a turn. Published agent
traces with stop reasons are replayed with and without them. ``splits.toml`` declares sizes and
seeds in section ``stop-reasons``. A trace with a missing file is skipped.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from experiments.provenance import ROOT
from experiments.studies import common
from experiments.tables import Column, Table
from hybridcache import Trace, open_trace
from hybridcache.lab.board import Split
from hybridcache.lab.intervals import interval, paired
from hybridcache.lab.trace import Held, TraceRequest


def rates(
    trace: Trace,
    without: Callable[[TraceRequest], TraceRequest],
    gib: tuple[float, ...],
    pair: str,
    model: str,
) -> list[tuple[float, float]]:
    """Return (token hit rate, that without an information in the requests) for each size."""
    poorer = replace(trace, source=Held(tuple(map(without, trace))))
    both = (
        common.replay(variant, gib, common.PAIRS[pair], model=model) for variant in (trace, poorer)
    )
    return [
        (common.rounded(one.token_hit_rate), common.rounded(other.token_hit_rate))
        for one, other in zip(*both, strict=True)
    ]


def measure(job: tuple[str, int]) -> list[dict[str, Any]]:
    """Return one record per pair and size of (trace, seed)."""
    (name, seed), split = job, Split.load()
    [sizes] = [cell.sizes for cell in split.cells if cell.name == name]
    assert not isinstance(sizes, str)
    trace = open_trace(common.seeded(name, seed)).kept()
    return [
        {"trace": name, "seed": seed, "gib": gib, "pair": pair}
        | {"with_hints": hinted, "without_hints": plain}
        for pair in common.PAIRS
        for gib, (hinted, plain) in zip(
            sizes,
            rates(trace, lambda one: one._replace(boundaries=()), sizes, pair, split.model),
            strict=True,
        )
    ]


def declared() -> dict[str, Any]:
    """Return the traces, sizes and seeds of the comparison of stop reasons."""
    splits = (ROOT / "experiments" / "splits.toml").read_text(encoding="utf-8")
    return tomllib.loads(splits)["stop-reasons"]


def measure_stop_reasons(job: tuple[str, int | None, tuple[float, ...]]) -> list[dict[str, Any]]:
    """Return one record per size of (trace, seed, sizes), for the default pair."""
    name, seed, gib = job
    path, model = common.published(name), declared()["model"]
    assert path is not None
    trace = open_trace(path if seed is None else common.seeded(path, seed)).kept()
    found = rates(trace, lambda one: one._replace(stop_reason=""), gib, "default pair", model)
    return [
        {"trace": name, "seed": seed, "gib": size}
        | {"with_stop_reasons": informed, "without_stop_reasons": plain}
        for size, (informed, plain) in zip(gib, found, strict=True)
    ]


def table(records: common.Records) -> Table:
    """Return one row per pair: hit rate with hints and the gain from them, in percent,
    over seeds."""
    rows = []
    for pair, cells in common.grouped(records, "pair").items():
        by_seed = common.grouped(cells, "seed").values()
        rates, plain = (
            [100 * sum(one[key] for one in of) / len(of) for of in by_seed]
            for key in ("with_hints", "without_hints")
        )
        rows.append([pair, interval(rates), paired(rates, plain)])
    columns = [Column("pair"), Column("token hit rate with hints", "%")]
    return Table([*columns, Column("gain from hints", "points")], rows)


def main() -> None:
    parser = common.command_line(__doc__)
    parser.add_argument(
        "--stop-reasons", action="store_true", help="measure stop reasons instead of boundaries"
    )
    options = parser.parse_args()
    if options.stop_reasons:
        jobs = [
            (file["trace"], seed, tuple(file["gib"]))
            for file in declared()["file"]
            for seed in file.get("seeds", (None,))
            if common.published(file["trace"]) is not None
        ]
        work = measure_stop_reasons
        common.run_study("study_stop_reasons", work, jobs, common.plain_table, options.processes)
        return
    split = Split.load().subset(num_seeds=options.seeds)
    cells = [(cell.name, seed) for cell in split.cells for seed in split.seeds]
    common.run_study("study_hints", measure, cells, table, options.processes)


if __name__ == "__main__":
    main()
