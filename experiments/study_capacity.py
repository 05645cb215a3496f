"""Which eviction policy wins at which size, on every trace? All policies, the rebuilt peers, the optimum with hindsight.

python -m experiments.study_capacity [--traces chat,agent] [--points 8] [--full] [--processes 2]
"""

from __future__ import annotations

from typing import Any

from experiments.lab import WORKLOADS, arguments, figure_path, keep, slim, sweep, workloads
from hybridcache.policies.eviction import EVICTION
from hybridcache.report import COLOURS, panels, save, size_axis
from hybridcache.simulate import SimulationResult

OURS = "regret @ regret"
"""Eviction and placement both by regret; all other policies with the default placement."""
PEERS = ("vllm", "sglang", "lightllm", "marconi")
OPTIMUM_REQUESTS = 700
"""Longest trace for which the optimum is worked out too."""


def main() -> None:
    options = arguments(__doc__, *WORKLOADS)
    results: list[SimulationResult] = []
    records: list[dict[str, Any]] = []
    for word in (bar := workloads(options)):
        requests = sum(1 for _ in WORKLOADS[word].open(word, options.full))
        result = sweep(
            word,
            options,
            bar,
            policy=sorted(EVICTION),
            baseline=PEERS,
            optimum="greedy" if requests <= OPTIMUM_REQUESTS else None,
        )
        ours = sweep(word, options, bar, policy="regret", checkpoints="regret", bound=False)
        result = result.beside(ours)
        results.append(result)
        records += [slim(word, run, bound=result.bound_rate) for run in result.runs]
    path = keep("study_capacity", records)
    draw(results)
    for result in results:
        print(result.table(), end="\n\n")
    print(path)


def draw(results: list[SimulationResult]) -> None:
    """A panel a trace: our policy and LRU as lines, all other policies as a band, the peers, the optimum and the bound."""
    rebuilt = [f"{peer} (rebuilt)" for peer in PEERS]
    figure, axes = panels(len(results))
    for axis, result in zip(axes, results, strict=True):
        by_label = result.by_label()
        sizes = [run.gib or 0.0 for run in next(iter(by_label.values()))]
        others = [
            [100 * run.token_hit_rate for run in runs]
            for label, runs in by_label.items()
            if label not in (OURS, "lru", *rebuilt)
        ]
        if others:
            low, high = (
                [pick(column) for column in zip(*others, strict=True)] for pick in (min, max)
            )
            axis.fill_between(
                sizes,
                low,
                high,
                color="#cccccc",
                alpha=0.6,
                linewidth=0,
                label="all other policies",
            )
        lines = [label for label in (OURS, "lru", *rebuilt) if label in by_label]
        for number, label in enumerate(lines):
            axis.plot(
                sizes,
                [100 * run.token_hit_rate for run in by_label[label]],
                color=COLOURS[number],
                linewidth=2.2 if label == OURS else 1.2,
                linestyle="--" if label in rebuilt else "-",
                label=label,
            )
        first = next(iter(by_label.values()))
        best = [(run.gib, run.optimum_tokens) for run in first if run.optimum_tokens is not None]
        if best:
            total = first[0].prompt_tokens
            axis.plot(
                [gib for gib, _ in best],
                [100 * tokens / total for _, tokens in best],
                color="black",
                marker=".",
                markersize=4,
                linewidth=0.8,
                label="clairvoyant greedy",
            )
        if result.bound_rate is not None:
            axis.axhline(
                100 * result.bound_rate,
                color="black",
                linewidth=0.8,
                linestyle=":",
                label="infinite cache",
            )
        size_axis(axis)
        axis.set_ylim(0, 100)
        axis.set_ylabel("token hit rate, %")
        axis.set_title(f"{result.trace} ({result.geometry.name})", fontsize=9)
    caption = (
        "Policies differ where memory is short and tie where it is not; below the black line lies what hindsight would still gain. "
        "Marconi saves states at any token, all others on the grid; LightLLM's states lie in host memory, not counted."
    )
    save(figure, axes, figure_path("study_capacity"), caption)


if __name__ == "__main__":
    main()
