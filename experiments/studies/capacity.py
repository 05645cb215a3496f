"""Compare eviction policies over memory with rebuilt systems.

    python -m experiments.studies.capacity [--traces chat,agent] [--points 8] [--full] [--seeds 10]

The default pair and LRU with fixed rules run with ``--seeds`` seeds of each generated trace. Their
curves get 95 % bands. The gain of the default pair gets an interval at each size, paired by seed.
Published traces have one seed and no band. The leaderboard has the other policies, and plans with
hindsight.
"""

from __future__ import annotations

import argparse
from typing import Any

from tqdm import tqdm

from experiments.studies.common import (
    STATIC_PLACEMENT,
    WORKLOADS,
    arguments,
    keep,
    rounded,
    workloads,
)
from hybridcache.lab.intervals import FEWEST_UNITS, band
from hybridcache.lab.simulation.simulate import SimulationResult, simulate
from hybridcache.policies.registry import DEFAULT_EVICTION, DEFAULT_PLACEMENT

OURS = f"{DEFAULT_EVICTION} @ {DEFAULT_PLACEMENT}"
"""The default pair. All other policies use ``STATIC_PLACEMENT``."""
LRU_PAIR = ("lru", STATIC_PLACEMENT)
PEERS = ("vllm", "sglang", "lightllm", "marconi-static")
"""Rebuilt systems. Marconi with one fixed weight, because tuning it replays a trace 21 times."""
POLICIES = ("lru", "lfu", "lhd", "gdsf", DEFAULT_EVICTION)


def main() -> None:
    options = arguments(__doc__, *WORKLOADS)
    lines: list[dict[str, Any]] = []
    for name in (bar := workloads(options)):
        rivals = sweep(name, options, bar, policy=POLICIES, baseline=PEERS)
        ours = sweep(name, options, bar, policy=DEFAULT_EVICTION, checkpoints=DEFAULT_PLACEMENT)
        result = rivals.beside(ours)
        added = records(result)
        if bands := over_seeds(name, options, bar):
            for record in added:
                record |= bands.get(record["label"], {})
        lines += added
        keep("study_capacity", lines)
        print(result.table(), end="\n\n")


def sweep(
    name: str, options: argparse.Namespace, bar: tqdm[Any], **settings: Any
) -> SimulationResult:
    """Simulate a workload over its sizes, with ``STATIC_PLACEMENT`` unless ``settings`` differ."""
    workload = WORKLOADS[name]
    bar.set_description(name)
    return simulate(
        workload.open(name, options.full),
        **{"checkpoints": STATIC_PLACEMENT} | settings,
        model=workload.geometry,
        grid=workload.grid,
        gib=workload.sizes(options.points),
        bound=False,
        processes=options.processes,
        progress=lambda done, total: bar.set_postfix_str(f"{done} of {total}"),
    )


def over_seeds(name: str, options: argparse.Namespace, bar: tqdm[Any]) -> dict[str, dict[str, Any]]:
    """Return limits of the curves over seeds by label, empty for a published trace."""
    workload = WORKLOADS[name]
    if workload.is_file or options.seeds < FEWEST_UNITS:
        return {}
    curves: dict[str, list[list[float]]] = {OURS: [], "lru": []}
    for seed in range(options.seeds):
        bar.set_description(f"{name}, seed {seed}")
        trace = workload.open(name, options.full, seed).kept()
        for label, pair in ((OURS, (DEFAULT_EVICTION, DEFAULT_PLACEMENT)), ("lru", LRU_PAIR)):
            result = simulate(
                trace,
                model=workload.geometry,
                grid=workload.grid,
                gib=workload.sizes(options.points),
                policy=pair[0],
                checkpoints=[pair[1]],
                bound=False,
                processes=options.processes,
            )
            curves[label].append([run.token_hit_rate for run in result.runs])
    found: dict[str, dict[str, Any]] = {}
    for label, several in curves.items():
        points = band(several)
        found[label] = {
            "seeds": options.seeds,
            "low": rounded([point.low for point in points]),
            "high": rounded([point.high for point in points]),
        }
    gains = band(
        [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(*curves.values(), strict=True)]
    )
    found[OURS]["gain"] = [rounded([100 * part for part in gain]) for gain in gains]
    return found


def records(result: SimulationResult) -> list[dict[str, Any]]:
    """Return one record per competitor with one figure per size. A policy is named ``eviction`` if
    its placement is ``STATIC_PLACEMENT``, else ``eviction @ placement``."""
    lines = []
    for label, runs in result.by_label().items():
        config = runs[0].config
        if config.baseline is None:
            is_static = config.checkpoints == STATIC_PLACEMENT
            label = f"{config.policy}" + (f" @ {config.checkpoints}" if not is_static else "")
        lines.append(
            {
                "trace": result.trace,
                "model": result.geometry.name,
                "requests": runs[0].requests,
                "prompt_tokens": runs[0].prompt_tokens,
                "grid": config.grid,
                "gib": rounded([run.gib for run in runs]),
                "label": label,
                "token_hit_rate": rounded([run.token_hit_rate for run in runs]),
                "ttft_p99_s": rounded([run.ttft_s[99] for run in runs]),
            }
        )
    return lines


if __name__ == "__main__":
    main()
