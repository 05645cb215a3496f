"""Compare eviction policies over memory with rebuilt systems and the best plan with hindsight.

    python -m experiments.studies.capacity [--traces chat,agent] [--few] [--points 8] [--full]
    [--resume out/capacity] [--seeds 10]

The default pair and LRU with fixed rules run with ``--seeds`` seeds of each generated trace. Their
curves get 95 % bands. The gain of the default pair gets an interval at each size, paired by seed.
Published traces have one seed and no band.

Results are written after every trace. With --resume, every single run is stored and a
stopped study continues. On the long traces, and with --few on all, five policies represent all 21.
Marconi's score then has one weight, because tuning it replays the trace 21 times.
"""

from __future__ import annotations

import argparse
from typing import Any

from tqdm import tqdm

from experiments.studies.common import (
    STATIC_PLACEMENT,
    WORKLOADS,
    arguments,
    by_competitor,
    keep,
    plan_next_to_running,
    rounded,
    sweep,
    workloads,
)
from hybridcache.lab.figures import PLAN
from hybridcache.lab.intervals import FEWEST_UNITS, band
from hybridcache.lab.simulation.simulate import SimulationResult, simulate
from hybridcache.policies.registry import DEFAULT_EVICTION, DEFAULT_PLACEMENT, EVICTION

OURS = f"{DEFAULT_EVICTION} @ {DEFAULT_PLACEMENT}"
"""The default pair. All other policies use ``STATIC_PLACEMENT``."""
LRU_PAIR = ("lru", STATIC_PLACEMENT)
PEERS = ("vllm", "sglang", "lightllm", "marconi")
LONG = ("conversations", "mooncake", "coding-agent", "tau-bench", "sharegpt")
FEW_PEERS = (*PEERS[:-1], "marconi-static")
FEW_POLICIES = ("lru", "lfu", "lhd", "gdsf", DEFAULT_EVICTION)


def main() -> None:
    options = arguments(__doc__, *WORKLOADS, policy=True, few=True, seeds=True)
    lines: list[dict[str, Any]] = []
    results: list[SimulationResult] = []
    for name in (bar := workloads(options)):
        few = options.few or name in LONG
        result = sweep(
            name,
            options,
            bar,
            policy=(*(FEW_POLICIES if few else sorted(EVICTION)), *options.policy),
            baseline=FEW_PEERS if few else PEERS,
        )
        ours = sweep(
            name,
            options,
            bar,
            policy=DEFAULT_EVICTION,
            checkpoints=DEFAULT_PLACEMENT,
            bound=False,
        )
        results.append(result.beside(ours))
        added = records(results[-1])
        added[-1]["next_to_running"] = plan_next_to_running(results[-1], name, options.full)
        if bands := over_seeds(name, options, bar):
            for record in added:
                record |= bands.get(record["label"], {})
        lines += added
        path = keep("study_capacity", lines)
    for result in results:
        print(result.table(), result.table("optimum"), sep="\n\n", end="\n\n")
    print(path)


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
    """Return one record per competitor with one figure per size. The last is the best plan with
    hindsight."""
    by_label = by_competitor(result)
    first = next(iter(by_label.values()))
    common = {
        "trace": result.trace,
        "model": result.geometry.name,
        "requests": first[0].requests,
        "prompt_tokens": first[0].prompt_tokens,
        "grid": first[0].config.grid,
        "gib": rounded([run.gib for run in first]),
    }
    lines = [
        common
        | {
            "label": label,
            "token_hit_rate": rounded([run.token_hit_rate for run in runs]),
            "share_of_optimum": rounded([run.share_of_optimum for run in runs]),
            "ttft_p99_s": rounded([run.ttft_s[99] for run in runs]),
        }
        for label, runs in by_label.items()
    ]
    plan = [(run.optimum_tokens or 0) / run.prompt_tokens for run in first]
    limits = {
        "label": PLAN,
        "token_hit_rate": rounded(plan),
        "infinite_cache": rounded(result.bound_rate),
    }
    return [*lines, common | limits]


if __name__ == "__main__":
    main()
