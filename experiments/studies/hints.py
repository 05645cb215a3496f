"""Measure the worth of boundary hints. Rebuilt systems do not get them.

    python -m experiments.studies.hints [--seeds 10] [--processes 2]

A request may name boundaries: positions at which its prompt consists of parts, such as messages.
Placements can save a checkpoint there. Every cell of the evaluation split is replayed with these
hints and without, by the default pair and by LRU with fixed rules. The difference, paired by seed,
is the advantage over a rebuilt system that the hints alone explain.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from experiments.studies.common import STATIC_PLACEMENT, keep, rounded
from hybridcache import Trace, TraceRequest, open_trace, simulate
from hybridcache.lab.intervals import Interval, interval, paired
from hybridcache.lab.leaderboard import Split
from hybridcache.lab.report import text_table
from hybridcache.policies.registry import DEFAULT_EVICTION, DEFAULT_PLACEMENT

PAIRS = {
    "default pair": (DEFAULT_EVICTION, DEFAULT_PLACEMENT),
    "lru, fixed rules": ("lru", STATIC_PLACEMENT),
}


@dataclass(frozen=True, slots=True)
class WithoutHints:
    """The requests of a trace, their boundaries removed."""

    requests: tuple[TraceRequest, ...]

    def __call__(self) -> Any:
        return iter(self.requests)


def without_hints(trace: Trace) -> Trace:
    """Return the trace with no boundary in any request."""
    return replace(trace, source=WithoutHints(tuple(one._replace(boundaries=()) for one in trace)))


def measure(split: Split, processes: int = 1) -> list[dict[str, Any]]:
    """Return a record per trace, seed, pair and size."""
    records = []
    jobs = [(trace, seed) for trace in split.gib for seed in split.seeds]
    for name, seed in tqdm(jobs, disable=None):
        trace = open_trace(f"{name}{'&' if '?' in name else '?'}seed={seed}").kept()
        for pair, (policy, placement) in PAIRS.items():
            rates = {
                hints: simulate(
                    variant,
                    model=split.model,
                    gib=split.gib[name],
                    policy=policy,
                    checkpoints=[placement],
                    bound=False,
                    processes=processes,
                ).runs
                for hints, variant in (("with", trace), ("without", without_hints(trace)))
            }
            for gib, one, other in zip(split.gib[name], *rates.values(), strict=True):
                records.append(
                    {"trace": name, "seed": seed, "gib": gib, "pair": pair}
                    | {"with_hints": rounded(one.token_hit_rate)}
                    | {"without_hints": rounded(other.token_hit_rate)}
                )
    return records


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
    options = parser.parse_args()
    records = measure(Split.load().head(options.seeds, options.only), options.processes)
    keep("study_hints", records)
    rows = [[pair, *map(str, both)] for pair, both in gains(records).items()]
    print(text_table(["pair", "token hit rate with hints, %", "gain from hints, points"], rows))


if __name__ == "__main__":
    main()
