"""Compare eviction policies over memory with rebuilt systems.

    python -m experiments.studies.capacity [--traces chat agent] [--seeds 5] [--processes 2]

The default pair and LRU with fixed rules run with ``--seeds`` seeds of each generated trace. Their
curves get 95 % bands. The gain of the default pair gets an interval at each size, paired by seed.
Published traces have one seed and no band. The leaderboard has the other policies, and plans with
hindsight.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np

from experiments.studies import common
from hybridcache.lab.traces.intervals import FEWEST_UNITS, interval
from hybridcache.policies.registry import DEFAULT_EVICTION

OURS = common.DEFAULT.replace("@", " @ ")
"""The default pair. All other policies use ``STATIC_PLACEMENT``."""
POLICIES = ("lru", "lfu", "lhd", "gdsf", DEFAULT_EVICTION)
COMPETITORS = {
    **{name: f"{name}@{common.STATIC_PLACEMENT}" for name in POLICIES},
    **{f"{name} (rebuilt)": name for name in (*common.REBUILT, "lightllm")},
    OURS: common.DEFAULT,
}
"""Pairs of policies and rebuilt systems by their labels."""


def main() -> None:
    options = common.command_line(__doc__, *common.WORKLOADS).parse_args()
    names = [name for name in options.traces if common.WORKLOADS[name].is_available]
    records = [*common.measured(competitors, names, options.processes)]
    generated = [name for name in names if not common.WORKLOADS[name].is_file]
    seeds = range(options.seeds if options.seeds >= FEWEST_UNITS else 0)
    jobs = list(product(generated, seeds))
    curves = dict(zip(jobs, common.measured(both_curves, jobs, options.processes), strict=True))
    for name, found in zip(names, records, strict=True):
        if (name, 0) in curves:
            bands = over_seeds(np.array([curves[name, seed] for seed in seeds]))
            for record in found:
                record |= bands.get(record["label"], {})
    lines = [record for found in records for record in found]
    common.keep("study_capacity", lines, table=common.plain_table)


def competitors(name: str) -> list[dict[str, Any]]:
    """Return one record per competitor with one figure per size."""
    workload = common.WORKLOADS[name]
    trace, sizes = workload.open(name).kept(), workload.sizes()
    settings: dict[str, Any] = {"model": workload.geometry, "grid": workload.grid}
    found = {of: common.replay(trace, sizes, COMPETITORS[of], **settings) for of in COMPETITORS}
    return [
        {
            "trace": name,
            "model": workload.geometry.name,
            "requests": runs[0].requests,
            "prompt_tokens": runs[0].prompt_tokens,
            "grid": workload.grid,
            "gib": common.rounded([run.gib for run in runs]),
            "label": label,
            "token_hit_rate": common.rounded([run.token_hit_rate for run in runs]),
            "ttft_p99_s": common.rounded([run.ttft_s[99] for run in runs]),
        }
        for label, runs in found.items()
    ]


def both_curves(job: tuple[str, int]) -> list[list[float]]:
    """Return the token hit rates over memory of the default pair and of LRU, for (trace, seed)."""
    name, seed = job
    workload = common.WORKLOADS[name]
    trace = workload.open(name, seed).kept()
    settings: dict[str, Any] = {"model": workload.geometry, "grid": workload.grid}
    return [
        [run.token_hit_rate for run in common.replay(trace, workload.sizes(), pair, **settings)]
        for pair in (common.DEFAULT, common.LRU)
    ]


def over_seeds(curves: np.ndarray) -> dict[str, dict[str, Any]]:
    """Return limits of the curves ``[seeds, 2, sizes]`` by label, and of their difference."""
    found: dict[str, dict[str, Any]] = {}
    for number, label in enumerate((OURS, "lru")):
        points = [interval(rates) for rates in curves[:, number].T.tolist()]
        low, high = ([getattr(point, limit) for point in points] for limit in ("low", "high"))
        found[label] = common.rounded({"seeds": len(curves), "low": low, "high": high})
    gains = (100 * (curves[:, 0] - curves[:, 1])).T.tolist()
    found[OURS]["gain"] = common.rounded([list(interval(gain)) for gain in gains])
    return found


if __name__ == "__main__":
    main()
