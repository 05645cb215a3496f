"""What is a smaller state worth? Checkpoints in float32, bfloat16 and int8 against the hit rate,
per policy.

    python -m experiments.study_state_bytes [--points 8]

The cost in logits is measured with the engine, not here.
"""

from __future__ import annotations

import argparse
from typing import Any

from experiments.lab import (
    arguments,
    by_competitor,
    figure_path,
    keep,
    slim,
    sweep,
    title,
    workloads,
)
from hybridcache.lab.figures import (
    COLOURS,
    panels,
    save,
    size_axis,
)
from hybridcache.lab.report import METRICS
from hybridcache.lab.simulation.simulate import SimulationResult

PRECISIONS = ("float32", "bfloat16", "int8")
POLICIES = ("lru", "regret")
DASHES = ("-", "--", ":", "-.")


def main() -> None:
    options = arguments(__doc__, "chat", "resend", "mooncake", "coding-agent", policy=True)
    options.points = options.points or 8
    results: list[list[SimulationResult]] = []
    records: list[dict[str, Any]] = []
    for word in (bar := workloads(options)):
        found = [
            sweep(word, options, bar, policy=(*POLICIES, *options.policy), state_dtype=precision)
            for precision in PRECISIONS
        ]
        results.append(found)
        for result in found:
            records += [
                slim(word, run, state_bytes=result.geometry.state_bytes) for run in result.runs
            ]
    keep("study_state_bytes", records)
    draw(results, options)
    for found in results:
        for precision, result in zip(PRECISIONS, found, strict=True):
            print(precision, result.table(), sep="\n", end="\n\n")


def draw(results: list[list[SimulationResult]], options: argparse.Namespace) -> None:
    """Two panels a trace: the hit rate, and its share of the best plan with states of the same
    size."""
    figure, axes = panels(2 * len(results), width=4.3, height=3.2, columns=4)
    for number, found in enumerate(results):
        for axis, word in zip(axes[2 * number :], ("hit", "optimum"), strict=False):
            metric = METRICS[word]
            for precision, colour, result in zip(PRECISIONS, COLOURS, found, strict=False):
                competitors = by_competitor(result).items()
                for dashes, (policy, runs) in zip(DASHES, competitors, strict=False):
                    state_mib = result.geometry.state_bytes / 2**20
                    axis.plot(
                        [run.gib for run in runs],
                        [metric.value(run) for run in runs],
                        color=colour,
                        linestyle=dashes,
                        linewidth=1.4,
                        label=f"{precision} ({state_mib:.0f} MiB), {policy}",
                    )
            size_axis(axis)
            axis.set_ylim(0, 105 if word == "optimum" else 100)
            axis.set_ylabel(metric.title)
            axis.set_title(title(found[0], options), fontsize=8.5)
    caption = (
        "Halving the state is worth up to twice the memory where checkpoints fill it (chat, "
        "resend), and little where KV does (long prompts). "
        "Right of each pair: share of the best plan with hindsight (clairvoyant greedy) whose "
        "states are as small, so a line that rises "
        "from blue to green says that small states are also easier to manage."
    )
    save(figure, axes, figure_path("study_state_bytes"), caption)


if __name__ == "__main__":
    main()
