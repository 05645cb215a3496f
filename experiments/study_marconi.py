"""Marconi against itself: the paper's equations, the artifact as it is, the artifact repaired, and
the baseline it was measured against.

python -m experiments.study_marconi [--points 6]
"""

from __future__ import annotations

from typing import Any

from experiments.lab import (
    MARCONI_7B,
    WORKLOADS,
    Workload,
    arguments,
    figure_path,
    keep,
    slim,
    sweep,
    workloads,
)
from hybridcache.lab.figures import sweep_figure
from hybridcache.lab.simulation.simulate import SimulationResult

READINGS = ("marconi", "marconi-artifact", "marconi-repaired", "sglang-plus")
POLICIES = ("lru", "regret")


def main() -> None:
    WORKLOADS["sysprompt-like"] = Workload("sharegpt-like?systems=6", "1:40:15", MARCONI_7B, grid=1)
    options = arguments(__doc__, "sharegpt-like", "chat", "sysprompt-like", policy=True)
    options.points = options.points or 8
    results: list[SimulationResult] = []
    records: list[dict[str, Any]] = []
    for word in (bar := workloads(options)):
        # On Marconi's own model and its grid of one token, whatever the trace.
        result = sweep(
            word,
            options,
            bar,
            model=MARCONI_7B,
            grid=1,
            policy=(*POLICIES, *options.policy),
            baseline=READINGS,
            proven=True,
        )
        results.append(result)
        records += [slim(word, run, bound=result.bound_rate) for run in result.runs]
    keep("study_marconi", records)
    caption = (
        "The three readings of Marconi lie close together but where a few shared prompts must be "
        "kept in little memory: there the artifact's "
        "slips help it, past regret too. With several checkpoints a prompt plain LRU overtakes all "
        "three once memory is not short. Right of "
        "each pair the share of the best plan with hindsight (clairvoyant greedy; the LP proves "
        "that no plan passes the thin line)."
    )
    sweep_figure(
        results, figure_path("study_marconi"), emphasised=("marconi (rebuilt)",), caption=caption
    )
    for result in results:
        print(result.table(), end="\n\n")
        print(result.table("optimum"), end="\n\n")


if __name__ == "__main__":
    main()
