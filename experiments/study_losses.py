"""Where are the tokens lost? Every prompt token by cause, over the memory size, with and without good placement.

python -m experiments.study_losses [--traces chat,mooncake]
"""

from __future__ import annotations

from typing import Any

from experiments.lab import arguments, figure_path, keep, slim, sweep, workloads
from hybridcache.report import losses_table, panels, save, size_axis
from hybridcache.simulate import SimulationResult

TRACES = ("chat", "few-shot", "resend", "branch", "mooncake", "coding-agent")
PLACEMENTS = ("backoff", "branch,boundary,backoff,end")
"""One state a prompt, at its last aligned position, as most engines save it; and the default."""
CAUSES = {
    "never_seen": ("never seen", "#d9d9d9"),
    "kv_evicted": ("KV evicted", "#1b6ca8"),
    "checkpoint_evicted": ("checkpoint evicted", "#c8553d"),
    "never_checkpointed": ("never checkpointed", "#d99a1c"),
    "below_grid": ("below the grid", "#8a5a9e"),
    "refused": ("refused", "#555555"),
}


def main() -> None:
    options = arguments(__doc__, *TRACES)
    results: list[SimulationResult] = []
    records: list[dict[str, Any]] = []
    for word in (bar := workloads(options)):
        result = sweep(word, options, bar, checkpoints=PLACEMENTS)
        results.append(result)
        records += [slim(word, run) for run in result.runs]
    keep("study_losses", records)
    draw(results)
    for result in results:
        print(losses_table(result.runs), end="\n\n")


def draw(results: list[SimulationResult]) -> None:
    """Two panels a trace: the causes stacked from the top over the size; what is white was reused."""
    figure, axes = panels(len(results) * len(PLACEMENTS), 3.9, 3.2, columns=4)
    pairs = [(result, placement) for result in results for placement in PLACEMENTS]
    for axis, (result, placement) in zip(axes, pairs, strict=True):
        runs = [run for run in result.runs if run.config["checkpoints"] == placement]
        sizes = [run.gib or 0.0 for run in runs]
        top = [100.0] * len(runs)
        for cause, (words, colour) in CAUSES.items():
            lost = [100 * (run.losses or {})[cause] / run.prompt_tokens for run in runs]
            floor = [high - part for high, part in zip(top, lost, strict=True)]
            if max(lost) > 0.05:
                axis.fill_between(sizes, floor, top, color=colour, linewidth=0, label=words)
            top = floor
        axis.plot(sizes, top, color="black", linewidth=1.2, label="reused: below the line")
        size_axis(axis)
        axis.set_ylim(0, 100)
        axis.set_ylabel("prompt tokens, %")
        axis.set_title(f"{result.trace}, LRU: {placement}", fontsize=8)
    caption = (
        "Left of each pair, one state a prompt, at its end: shared beginnings are lost to checkpoints that were never made, at any size. "
        "Right, branch point and boundary saved too: only eviction is left, and on long prompts LRU then loses more to it."
    )
    save(figure, axes, figure_path("study_losses"), caption)


if __name__ == "__main__":
    main()
