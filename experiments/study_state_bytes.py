"""What is a smaller state worth? Checkpoints in float32, bfloat16 and int8 against the hit rate, per policy.

    python -m experiments.study_state_bytes [--points 8]

The cost in logits is measured with the engine, not here.
"""

from __future__ import annotations

from typing import Any

from experiments.lab import arguments, figure_path, keep, slim, sweep, workloads
from hybridcache.report import COLOURS, panels, save, size_axis
from hybridcache.simulate import SimulationResult

PRECISIONS = ("float32", "bfloat16", "int8")
POLICIES = ("lru", "regret")
DASHES = ("-", "--")


def main() -> None:
    options = arguments(
        __doc__, "chat", "agent", "resend", "mooncake", "coding-agent", "conversations"
    )
    options.points = options.points or 8
    results: list[list[SimulationResult]] = []
    records: list[dict[str, Any]] = []
    for word in (bar := workloads(options)):
        found = [
            sweep(word, options, bar, policy=POLICIES, state_dtype=precision)
            for precision in PRECISIONS
        ]
        results.append(found)
        for result in found:
            records += [
                slim(word, run, state_bytes=result.geometry.state_bytes) for run in result.runs
            ]
    keep("study_state_bytes", records)
    draw(results)
    for found in results:
        for precision, result in zip(PRECISIONS, found, strict=True):
            print(precision, result.table(), sep="\n", end="\n\n")


def draw(results: list[list[SimulationResult]]) -> None:
    figure, axes = panels(len(results))
    for axis, found in zip(axes, results, strict=True):
        for precision, colour, result in zip(PRECISIONS, COLOURS, found, strict=False):
            for dashes, (policy, runs) in zip(DASHES, result.by_label().items(), strict=False):
                axis.plot(
                    [run.gib for run in runs],
                    [100 * run.token_hit_rate for run in runs],
                    color=colour,
                    linestyle=dashes,
                    linewidth=1.4,
                    label=f"{precision} ({result.geometry.state_bytes / 2**20:.0f} MiB), {policy}",
                )
        size_axis(axis)
        axis.set_ylabel("token hit rate, %")
        axis.set_title(f"{found[0].trace} ({found[0].geometry.name})", fontsize=9)
    caption = "Halving the state is worth up to twice the memory where checkpoints fill it (chat, resend), and little where KV does (long prompts)."
    save(figure, axes, figure_path("study_state_bytes"), caption)


if __name__ == "__main__":
    main()
