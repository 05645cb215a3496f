"""Does the best placement change with what a state is worth in tokens of KV? Models from 7 tokens a
state (LFM2) to thousands, each in memory for the same number of tokens.

    python -m experiments.studies.ratio [--traces chat,agent] [--points 3]
"""

from __future__ import annotations

import argparse
from typing import Any

from tqdm import tqdm

from experiments.studies.common import WORKLOADS, arguments, figure_path, keep, slim, workloads
from hybridcache import ModelGeometry, simulate
from hybridcache.lab.figures import COLOURS, panels, save
from hybridcache.lab.report import METRICS
from hybridcache.lab.simulation.simulate import SimulationResult

MODELS = (
    "LFM2-1.2B",
    "Olmo-Hybrid-7B",
    "Qwen3.5-4B",
    "Qwen3-Next-80B-A3B",
    "Kimi-Linear-48B-A3B",
    "Nemotron-3-Nano-30B-A3B",
)
"""By tokens a state is worth: 7, 446, 1,572, 3,144, 5,384, 7,989."""
PLACEMENTS = (
    "end",
    "branch,boundary,backoff,end",
    "every:64",
    "every:512",
    "every:2048",
    "balanced:4",
    "regret",
)


def main() -> None:
    options = arguments(__doc__, "chat", "agent", "branch", "few-shot", "resend", checkpoints=True)
    words = (*PLACEMENTS, *options.checkpoints)
    results: list[list[SimulationResult]] = []
    records: list[dict[str, Any]] = []
    for word in (bar := workloads(options)):
        found = [_simulate(word, model, options, words, bar) for model in MODELS]
        results.append(found)
        for result in found:
            more = {
                "model": result.geometry.name,
                "state_tokens": round(result.geometry.state_tokens, 1),
            }
            records += [slim(word, run, **more) for run in result.runs]
    keep("study_ratio", records)
    draw(results)
    for found in results:
        print(found[0].trace)
        for result in found:
            print(f"{result.geometry.name:28}{result.geometry.state_tokens:8,.0f}", _best(result))


def _simulate(
    word: str, model: str, options: argparse.Namespace, words: tuple[str, ...], bar: tqdm[Any]
) -> SimulationResult:
    """Simulate ``model`` with the bytes that hold as many tokens as the workload's own model would
    have."""
    workload, geometry = WORKLOADS[word], ModelGeometry.preset(model)
    bar.set_description(f"{word}, {model}")
    sizes = workload.sizes(options.points) if options.points else (workload.middle,)
    scale = geometry.kv_bytes_per_token / workload.geometry.kv_bytes_per_token
    return simulate(
        workload.open(word, options.full),
        model=geometry,
        gib=[scale * gib for gib in sizes],
        grid=workload.grid,
        policy="lru",
        checkpoints=words,
        processes=options.processes,
    )


def _ranked(result: SimulationResult) -> list[tuple[str, float]]:
    """Placements with their hit rates at the middle size, the best first."""
    middle = {
        word: runs[len(runs) // 2].token_hit_rate for word, runs in _by_placement(result).items()
    }
    return sorted(middle.items(), key=lambda item: -item[1])


def _best(result: SimulationResult) -> str:
    return "   ".join(f"{word} {100 * rate:.1f}" for word, rate in _ranked(result))


def _by_placement(result: SimulationResult) -> dict[str, Any]:
    return {runs[0].config.checkpoints: runs for runs in result.by_label().values()}


def draw(results: list[list[SimulationResult]]) -> None:
    """A panel a trace, a line a placement: the hit rate over what a state is worth, at the middle
    size."""
    figure, axes = panels(len(results), width=4.6, height=3.4, columns=3)
    for axis, found in zip(axes, results, strict=True):
        worth = [result.geometry.state_tokens for result in found]
        lines = [_by_placement(result) for result in found]
        for place, word in enumerate(lines[0]):
            rates = [METRICS["hit"].value(by[word][len(by[word]) // 2]) for by in lines]
            colour, dashes = COLOURS[place % len(COLOURS)], "--" if word == "regret" else "-"
            axis.plot(
                worth, rates, color=colour, linestyle=dashes, marker=".", linewidth=1.3, label=word
            )
        axis.set_xscale("log")
        axis.set_ylim(0, 100)
        axis.set_xlabel("tokens of KV that one state is as large as")
        axis.set_ylabel(METRICS["hit"].title)
        axis.set_title(f"{found[0].trace}, {found[0].runs[0].requests:,} requests", fontsize=8.5)
    caption = (
        "Six models in memory for the same number of tokens, from LFM2's windows of short "
        "convolutions to Nemotron's Mamba-2 states; grid and eviction (LRU) are the same. Where "
        "memory is ample (branch) the order of placements hardly changes. Where it is short, all "
        "fall as states grow, and dense ones first."
    )
    for found in results:
        if found[0].trace == "agent":
            leaders = [
                f"{_ranked(result)[0][0]} at {result.geometry.state_tokens:,.0f}"
                for result in found
            ]
            caption += f" The best on agent, by tokens a state: {', '.join(leaders)}."
    save(figure, axes, figure_path("study_ratio"), caption)


if __name__ == "__main__":
    main()
