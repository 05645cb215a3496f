"""Measure the gain from boundary hints and stop reasons, which rebuilt systems do not get.

    python -m experiments.studies.hints [--seeds 10] [--processes 2]
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

import argparse
import tomllib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from experiments.provenance import ROOT
from experiments.studies.common import PAIRS, hit_rates, keep, published, show
from hybridcache import Trace, open_trace
from hybridcache.lab.intervals import interval, paired
from hybridcache.lab.leaderboard import Split
from hybridcache.lab.report import text_table
from hybridcache.lab.trace import Held


def without_hints(trace: Trace) -> Trace:
    """Return the trace with no boundary in any request."""
    return replace(trace, source=Held(tuple(one._replace(boundaries=()) for one in trace)))


def without_stop_reasons(trace: Trace) -> Trace:
    """Return the trace with no stop reason in any request."""
    return replace(trace, source=Held(tuple(one._replace(stop_reason="") for one in trace)))


def rates(
    trace: Trace,
    without: Callable[[Trace], Trace],
    gib: tuple[float, ...],
    pair: str,
    model: str,
    processes: int,
) -> list[tuple[float, float]]:
    """Return (token hit rate of ``trace``, token hit rate of ``without(trace)``) for each size."""
    both = [
        hit_rates(variant, gib, pair, model, processes=processes)
        for variant in (trace, without(trace))
    ]
    return list(zip(*both, strict=True))


def measure(split: Split, processes: int = 1) -> list[dict[str, Any]]:
    """Return one record per trace, seed, pair and size."""
    records = []
    jobs = [(trace, seed) for trace in split.gib for seed in split.seeds]
    for name, seed in tqdm(jobs, disable=None):
        trace = open_trace(f"{name}{'&' if '?' in name else '?'}seed={seed}").kept()
        for pair in PAIRS:
            found = rates(trace, without_hints, split.gib[name], pair, split.model, processes)
            records += [
                {"trace": name, "seed": seed, "gib": gib, "pair": pair}
                | {"with_hints": hinted, "without_hints": plain}
                for gib, (hinted, plain) in zip(split.gib[name], found, strict=True)
            ]
    return records


def measure_stop_reasons(processes: int = 1) -> list[dict[str, Any]]:
    """Return one record per trace, seed and size, for the default pair."""
    splits = (ROOT / "experiments" / "splits.toml").read_text(encoding="utf-8")
    declared = tomllib.loads(splits)["stop-reasons"]
    records = []
    for file in declared["file"]:
        path = published(file["trace"])
        for seed in file.get("seeds", (None,)) if path is not None else ():
            trace = open_trace(f"{path}&seed={seed}" if seed is not None else path).kept()
            gib = tuple(file["gib"])
            pair = "default pair"
            found = rates(trace, without_stop_reasons, gib, pair, declared["model"], processes)
            records += [
                {"trace": file["trace"], "seed": seed, "gib": size}
                | {"with_stop_reasons": informed, "without_stop_reasons": plain}
                for size, (informed, plain) in zip(gib, found, strict=True)
            ]
    return records


def table(records: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return a header and one row per pair: hit rate with hints and the gain from them, in percent,
    over seeds."""
    rows = []
    for pair in dict.fromkeys(record["pair"] for record in records):
        means: dict[str, list[float]] = {"with_hints": [], "without_hints": []}
        for seed in dict.fromkeys(record["seed"] for record in records):
            cells = [one for one in records if one["pair"] == pair and one["seed"] == seed]
            for key, several in means.items():
                several.append(100 * sum(one[key] for one in cells) / len(cells))
        rows.append([pair, str(interval(means["with_hints"])), str(paired(*means.values()))])
    return ["pair", "token hit rate with hints, %", "gain from hints, points"], rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, help="use only the first N seeds (default: all ten)")
    parser.add_argument("--only", default="", help="use only traces with this in their name")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--stop-reasons", action="store_true", help="measure stop reasons instead of boundaries"
    )
    options = parser.parse_args()
    if options.stop_reasons:
        records = measure_stop_reasons(options.processes)
        keep("study_stop_reasons", records)
        show(records)
        return
    records = measure(Split.load().head(options.seeds, options.only), options.processes)
    keep("study_hints", records)
    print(text_table(*table(records)))


if __name__ == "__main__":
    main()
