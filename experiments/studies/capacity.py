"""Compare eviction policies over memory with rebuilt systems and the best plan with hindsight.

    python -m experiments.studies.capacity [--traces chat,agent] [--few] [--points 8] [--full]
    [--resume out/capacity] [--seeds 10]

The default pair and LRU with fixed rules run with ``--seeds`` seeds of each generated trace. Their
curves get 95 % bands. The gain of the default pair gets an interval at each size, paired by seed.
Published traces have one seed and no band.

Results and figure are written after every trace. With --resume, every single run is stored and a
stopped study continues. On the long traces, and with --few on all, five policies represent all 21.
Marconi's score then has one weight, because tuning it replays the trace 21 times.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from experiments.studies.common import (
    STATIC_PLACEMENT,
    WORKLOADS,
    arguments,
    by_competitor,
    figure_path,
    keep,
    plan_next_to_running,
    rounded,
    sweep,
    workloads,
)
from hybridcache.lab.figures import (
    COLOURS,
    PLAN,
    panels,
    save,
    size_axis,
)
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
CAPTION = (
    "Left of each pair: token hit rate. Right: the same as a share of the best plan with "
    "hindsight (greedy). "
    "Policies differ where memory is short; the gain that hindsight would still allow is largest "
    "at the left. Grey: between the best and the worst of all other policies. Marconi saves "
    "states at any token, and its running requests are not counted; all others and the plan use "
    "the grid. marconi-static has one fixed weight. LightLLM's states are in host memory, which "
    "the size does not count. Both can pass 100 %. Lines: one seed. Coloured bands: 95 % of the "
    "mean over seeds."
)


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
        draw(lines, (OURS, "lru", *options.policy), options.full)
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


def draw(lines: list[dict[str, Any]], highlighted: Sequence[str], full: bool) -> None:
    """Draw two panels per trace: the hit rate, and its share of the best plan.

    Policies in ``highlighted`` and rebuilt systems are lines, all others a band.
    """
    names = list(dict.fromkeys(record["trace"] for record in lines))
    figure, axes = panels(2 * len(names), width=4.3, height=2.9, columns=4)
    for number, name in enumerate(names):
        *runs, limits = (record for record in lines if record["trace"] == name)
        hit, share = axes[2 * number : 2 * number + 2]
        _draw(hit, runs, highlighted, "token_hit_rate")
        _draw(share, runs, highlighted, "share_of_optimum")
        _draw_limits(hit, limits)
        share.axhline(100, color="black", linewidth=0.8)
        hit.set_ylim(0, min(100, 125 * limits["infinite_cache"]))
        share.set_ylim(0, 120)
        hit.set_ylabel("token hit rate, %")
        share.set_ylabel("share of the best plan, %")
        first = "" if full or WORKLOADS[name].quick is None else "first "
        for axis in (hit, share):
            size_axis(axis)
            axis.set_title(
                f"{name}, {first}{limits['requests']:,} requests ({limits['model']})", fontsize=8.5
            )
    save(figure, axes, figure_path("study_capacity"), CAPTION)


def _draw(axis: Any, runs: Sequence[dict[str, Any]], highlighted: Sequence[str], key: str) -> None:
    lines = {run["label"]: [100 * (value or 0) for value in run[key]] for run in runs}
    sizes = runs[0]["gib"]
    rebuilt = [label for label in lines if label.endswith("(rebuilt)")]
    highlighted = [label for label in (*highlighted, *rebuilt) if label in lines]
    others = [line for label, line in lines.items() if label not in highlighted]
    if others:
        low, high = (_envelope(others, pick) for pick in (min, max))
        axis.fill_between(
            sizes, low, high, color="#cccccc", alpha=0.6, linewidth=0, label="all other policies"
        )
    for number, label in enumerate(highlighted):
        [line] = [run for run in runs if run["label"] == label]
        if key == "token_hit_rate" and "low" in line:
            low, high = ([100 * rate for rate in line[end]] for end in ("low", "high"))
            colour = COLOURS[number % len(COLOURS)]
            axis.fill_between(sizes, low, high, color=colour, alpha=0.25, linewidth=0)
        axis.plot(
            sizes,
            lines[label],
            color=COLOURS[number % len(COLOURS)],
            linewidth=2.2 if label == OURS else 1.2,
            linestyle="--" if label in rebuilt else "-",
            label=label,
        )


def _draw_limits(axis: Any, limits: dict[str, Any]) -> None:
    sizes = limits["gib"]
    plan = [100 * rate for rate in limits["token_hit_rate"]]
    axis.plot(sizes, plan, "k.-", linewidth=1.0, markersize=4, label=PLAN)
    if "next_to_running" in limits:
        counted = [100 * rate for rate in limits["next_to_running"]]
        axis.plot(sizes, counted, "k:", linewidth=1.0, label="plan next to running requests")
    axis.axhline(
        100 * limits["infinite_cache"],
        color="black",
        linewidth=0.8,
        linestyle=":",
        label="infinite cache",
    )


def _envelope(
    lines: Sequence[Sequence[float]], pick: Callable[[Sequence[float]], float]
) -> list[float]:
    return [pick(column) for column in zip(*lines, strict=True)]


if __name__ == "__main__":
    main()
