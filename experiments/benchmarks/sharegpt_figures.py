"""Figures of run_sharegpt, drawn from its results file.

python -m experiments.benchmarks.sharegpt_figures experiments/results/sharegpt.jsonl
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from experiments.provenance import FIGURES, read_json_lines

Record = dict[str, Any]
LINES = ("#1b6ca8", "#d1495b", "#3a7d44", "#8d6a9f", "#edae49", "#5c5c5c")
CAUSES = {
    "cached": ("from the cache", "#1b6ca8"),
    "never_seen": ("never seen", "#c9ced6"),
    "kv_evicted": ("KV evicted", "#d1495b"),
    "checkpoint_evicted": ("checkpoint evicted", "#e58f65"),
    "never_checkpointed": ("never checkpointed", "#edae49"),
    "below_grid": ("below the grid", "#8d6a9f"),
    "refused": ("refused", "#3d3d3d"),
    "not_fetched": ("not fetched", "#6a9a5b"),
}
"""Labels and colours of the stacked bars, by use or loss cause of prompt tokens."""
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "font.size": 9.5,
    "legend.frameon": False,
    "figure.dpi": 120,
    "savefig.dpi": 160,
}


def draw(records: Sequence[Record], source: str, path: Path) -> None:
    """Draw a figure of ``records`` with the panels that they have data for.

    Panels: hit rate over budget, time to first token, and the use of prompt tokens.
    """
    panels = [draw_tokens] if any(record["cache"] != "none" for record in records) else []
    if any(record["ttft_s"] for record in records):
        panels.insert(0, draw_ttft)
    if len({record["cache_gib"] for record in records}) > 1:
        panels[:0] = [draw_hit_rate]
        if any("share_of_plan" in record for record in records):
            panels.insert(1, draw_share)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1,
            len(panels),
            figsize=(5.4 * len(panels), 4.6),
            layout=ConstrainedLayoutEngine(wspace=0.06),
            squeeze=False,
        )
        for panel, ax in zip(panels, axes[0], strict=True):
            panel(ax, records)
        wrapped = "\n".join(
            line for part in source.splitlines() for line in textwrap.wrap(part, 80 * len(panels))
        )
        figure.supxlabel(wrapped, fontsize=7.5, color="#5c5c5c", x=0.01, ha="left")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)


def draw_hit_rate(ax: Axes, records: Sequence[Record]) -> None:
    """Draw the token hit rate over the memory of the cache."""
    for label, color in zip(_labels(records), LINES, strict=False):
        points = sorted(
            (record["cache_gib"], record["token_hit_rate"])
            for record in records
            if record["label"] == label
        )
        ax.plot(*zip(*points, strict=True), "o-", color=color, label=label, markersize=4)
    plans = {r["cache_gib"]: r["plan_token_hit_rate"] for r in records if "share_of_plan" in r}
    if plans:
        points = sorted(plans.items())
        ax.plot(*zip(*points, strict=True), "k.-", linewidth=0.9, label="best plan with hindsight")
    _size_axis(ax)
    ax.set_ylim(0, 1)
    ax.set(title="Token hit rate", xlabel="memory for KV and states (GiB)")
    _legend_below(ax)


def draw_share(ax: Axes, records: Sequence[Record]) -> None:
    """Draw the token hit rate as a share of the greedy plan with hindsight, for caches with
    states."""
    for label, color in zip(_labels(records), LINES, strict=False):
        points = sorted(
            (record["cache_gib"], record["share_of_plan"])
            for record in records
            if record["label"] == label and "share_of_plan" in record
        )
        if points:
            ax.plot(*zip(*points, strict=True), "o-", color=color, label=label, markersize=4)
    _size_axis(ax)
    ax.set_ylim(0, 1.05)
    ax.set(title="Share of the best plan with hindsight", xlabel="memory for KV and states (GiB)")
    _legend_below(ax)


def _size_axis(ax: Axes) -> None:
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda gib, _: f"{gib:g}"))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.grid(axis="y", color="#e5e7eb")


def draw_ttft(ax: Axes, records: Sequence[Record]) -> None:
    """Draw the distribution of the time to first token, for the largest budget of each cache."""
    measured = [record for record in _largest(records) if record["ttft_s"]]
    for record, color in zip(measured, _colors(measured), strict=True):
        times = np.sort(record["ttft_s"]) * 1e3
        share = np.arange(1, len(times) + 1) / len(times)
        name = "no cache" if record["cache"] == "none" else record["label"]
        label = f"{name}: median {np.median(times):,.0f} ms"
        ax.step(times, share, where="post", color=color, label=label, linewidth=1.8)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:,g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.grid(axis="y", color="#e5e7eb")
    ax.set(title="Time to first token", xlabel="milliseconds", ylabel="share of requests")
    _legend_below(ax)


def draw_tokens(ax: Axes, records: Sequence[Record]) -> None:
    """Draw the prompt tokens: reused, or computed by loss cause."""
    bars = [record for record in _largest(records) if record["cache"] != "none"]
    left = np.zeros(len(bars))
    names = [_bar_name(record) for record in bars]
    for key, (cause, color) in CAUSES.items():
        tokens = [
            record["token_hit_rate"] * record["prompt_tokens"]
            if key == "cached"
            else record["lost_tokens"][key]
            for record in bars
        ]
        shares = np.divide(tokens, [record["prompt_tokens"] for record in bars])
        if not shares.any():
            continue
        drawn = ax.barh(names, shares, left=left, color=color, label=cause, height=0.6)
        ax.bar_label(
            drawn,
            [f"{share:.0%}" if share >= 0.06 else "" for share in shares],
            label_type="center",
            color="white" if key in ("cached", "kv_evicted", "refused") else "#222222",
        )
        left += shares
    ax.set_ylim(max(len(bars), 3) - 0.5, -0.5)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlim(0, 1)
    budgets = {record["cache_gib"] for record in bars}
    at = f" at {budgets.pop():g} GiB" if len(budgets) == 1 else ""
    ax.set(title=f"Use of prompt tokens{at}", xlabel="share of prompt tokens")
    _legend_below(ax)


def _bar_name(record: Record) -> str:
    name: str = record["label"].replace(" · ", "\n").replace(", ", ",\n")
    share = record.get("share_of_plan")
    return name if share is None else f"{name}\n({share:.0%} of\nthe best plan)"


def _legend_below(ax: Axes) -> None:
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, columnspacing=1.2)


def _labels(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record["label"] for record in records))


def _largest(records: Sequence[Record]) -> list[Record]:
    """Return the record with the largest budget for each label."""
    return [
        max((r for r in records if r["label"] == label), key=lambda record: record["cache_gib"])
        for label in _labels(records)
    ]


def _colors(records: Sequence[Record]) -> list[str]:
    """Return grey for no cache, line colours for the others."""
    colors = iter(LINES)
    return ["#5c5c5c" if record["cache"] == "none" else next(colors) for record in records]


def describe(provenance: Record) -> str:
    """Return the caption of a figure: its content and its source."""
    machine = provenance["machine"]
    cap = provenance.get("settings", {}).get("cap")
    lengths = "" if cap is None else f" Prompts have up to {cap:,} tokens."
    caption = (
        "Memory that a cache needs to reuse all shared tokens, its distance from the greedy plan "
        f"with hindsight, and the causes of recomputation.{lengths} radix: KV only, as for a "
        "model without states."
    )
    origin = f"{machine['cores']} cores {machine['cpu']}, {provenance['date'][:10]}"
    return f"{caption}\n{provenance['command']}\ncommit {provenance['commit']}, {origin}"


if __name__ == "__main__":
    results = Path(sys.argv[1])
    provenance, records = read_json_lines(results)
    draw(records, describe(provenance), FIGURES / f"{results.stem}.png")
    print(FIGURES / f"{results.stem}.png")
