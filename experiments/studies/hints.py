"""Measure the worth of boundary hints and stop reasons. Rebuilt systems do not get them.

    python -m experiments.studies.hints [--seeds 10] [--processes 2]
    python -m experiments.studies.hints --stop-reasons

A request may name boundaries: positions at which its prompt consists of parts, such as messages.
Placements can save a checkpoint there. Every cell of the evaluation split is replayed with these
hints and without, by the default pair and by LRU with fixed rules. The difference, paired by seed,
is the advantage over a rebuilt system that the hints alone explain.

The stop reason of an answer (a tool call, or the end of a turn) is known to the engine. Published
agent traces that name it are replayed with it and without it. Their sizes and seeds are declared in
``splits.toml``, section ``stop-reasons``. A trace whose file is missing is left out.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from experiments.provenance import ROOT
from experiments.studies.common import PAIRS, hit_rates, keep, published
from hybridcache import Trace, TraceRequest, open_trace
from hybridcache.lab.intervals import Interval, interval, paired
from hybridcache.lab.leaderboard import Split
from hybridcache.lab.report import text_table


@dataclass(frozen=True, slots=True)
class Held:
    """Requests of a trace, some of their fields removed."""

    requests: tuple[TraceRequest, ...]

    def __call__(self) -> Any:
        return iter(self.requests)


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
    """Return (token hit rate of ``trace``, token hit rate ``without`` something) for each size."""
    both = [
        hit_rates(variant, gib, pair, model, processes=processes)
        for variant in (trace, without(trace))
    ]
    return list(zip(*both, strict=True))


def measure(split: Split, processes: int = 1) -> list[dict[str, Any]]:
    """Return a record per trace, seed, pair and size."""
    records = []
    jobs = [(trace, seed) for trace in split.gib for seed in split.seeds]
    for name, seed in tqdm(jobs, disable=None):
        trace = open_trace(f"{name}{'&' if '?' in name else '?'}seed={seed}").kept()
        for pair in PAIRS:
            found = rates(trace, without_hints, split.gib[name], pair, split.model, processes)
            records += [
                {"trace": name, "seed": seed, "gib": gib, "pair": pair}
                | {"with_hints": one, "without_hints": other}
                for gib, (one, other) in zip(split.gib[name], found, strict=True)
            ]
    return records


def measure_stop_reasons(processes: int = 1) -> list[dict[str, Any]]:
    """Return a record per trace, seed and size, for the default pair."""
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
                | {"with_stop_reasons": one, "without_stop_reasons": other}
                for size, (one, other) in zip(gib, found, strict=True)
            ]
    return records


def stop_reason_table(records: list[dict[str, Any]]) -> str:
    """Return a row per trace and size: both hit rates and the gain, means over seeds."""
    rows = []
    for name, gib in dict.fromkeys((record["trace"], record["gib"]) for record in records):
        cell = [record for record in records if (record["trace"], record["gib"]) == (name, gib)]
        means = {
            key: [100 * record[f"{key}_stop_reasons"] for record in cell]
            for key in ("with", "without")
        }
        both = [f"{sum(each) / len(each):.1f}" for each in means.values()]
        gain = paired(*means.values()).mean if len(cell) == 1 else paired(*means.values())
        rows.append(
            [
                name,
                f"{gib:g}",
                str(len(cell)),
                *both,
                f"{gain:+.1f}" if isinstance(gain, float) else str(gain),
            ]
        )
    return text_table(["trace", "GiB", "seeds", "with, %", "without, %", "gain, points"], rows)


def gains(records: list[dict[str, Any]]) -> dict[str, tuple[Interval, Interval]]:
    """Return by pair the hit rate with hints and the gain from them, over seeds, in percent."""
    found = {}
    for pair in dict.fromkeys(record["pair"] for record in records):
        means: dict[str, list[float]] = {"with_hints": [], "without_hints": []}
        for seed in dict.fromkeys(record["seed"] for record in records):
            cells = [one for one in records if one["pair"] == pair and one["seed"] == seed]
            for key, several in means.items():
                several.append(100 * sum(one[key] for one in cells) / len(cells))
        found[pair] = interval(means["with_hints"]), paired(*means.values())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, help="only the first of them (default: all ten)")
    parser.add_argument("--only", default="", help="only traces with this in their name")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--stop-reasons", action="store_true", help="stop reasons, not boundaries")
    options = parser.parse_args()
    if options.stop_reasons:
        records = measure_stop_reasons(options.processes)
        keep("study_stop_reasons", records)
        print(stop_reason_table(records))
        return
    records = measure(Split.load().head(options.seeds, options.only), options.processes)
    keep("study_hints", records)
    rows = [[pair, *map(str, both)] for pair, both in gains(records).items()]
    print(text_table(["pair", "token hit rate with hints, %", "gain from hints, points"], rows))


if __name__ == "__main__":
    main()
