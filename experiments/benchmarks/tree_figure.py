"""The figure of `bench_tree`: ours beside the peers' published figures, and cost over the tree's
size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.provenance import FIGURES

PEERS = {
    "SGLang Rust": {"match": 6.1, "insert": 14.1, "request": 64.0, "long request": 326.0},
    "SGLang Python": {"match": 36.0, "insert": 64.0, "request": 213.0, "long request": 3523.0},
    "SGLang 0.5.20": {"match": 26.0, "insert": 32.0, "request": 121.0, "long request": 5294.0},
}
"""Published mean microseconds on the same workload, two shared cores."""


def draw(records: Sequence[dict[str, Any]]) -> None:
    """Ours beside the peers' published figures, and cost over the tree's size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    named = {record["measure"]: record for record in records}
    short, long = named["request"], named["long request, roomy"]
    means = {
        "match": short["verb_us_mean"]["match"],
        "insert": short["verb_us_mean"]["insert"],
        "request": short["request_us_mean"],
        "long request": long["request_us_mean"],
    }
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for number, (label, costs) in enumerate(({"hybridcache (Python)": means} | PEERS).items()):
        places = np.arange(len(costs)) + 0.2 * number - 0.3
        left.plot(places, list(costs.values()), "o", markersize=8, label=label)
        for place, cost in zip(places, costs.values(), strict=True):
            left.annotate(
                f"{cost:,.0f}", (place, cost), (0, 8), textcoords="offset points", ha="center"
            )
    left.set_xticks(range(len(means)), list(means))
    left.set(yscale="log", ylabel="mean microseconds", ylim=(3, 20_000), xlim=(-0.6, 3.6))
    left.set_title("Cost of the tree, same workload (peers: published means)")
    left.grid(axis="y", alpha=0.3)
    left.legend(fontsize=8, loc="upper left")
    grown = [record for record in records if "verb_us_median" in record]
    by_tokens = [record for record in grown if record["measure"].endswith("tokens")]
    by_nodes = [record for record in grown if record["measure"].endswith("nodes")]
    for verb, colour in (("match", "C0"), ("insert", "C1"), ("gather again", "C2")):
        for rows, axis_key, style in (
            (by_tokens, "cached_tokens", "-o"),
            (by_nodes, "nodes", "--x"),
        ):
            costs = [record["verb_us_median"][verb] for record in rows]
            label = f"{verb}, by {'tokens' if style == '-o' else 'nodes'}"
            right.plot([r[axis_key] for r in rows], costs, style, color=colour, label=label)
    for rows, axis_key, style in ((by_tokens, "cached_tokens", "-o"), (by_nodes, "nodes", "--x")):
        costs = [record["eviction_us_per_item"] for record in rows]
        label = f"eviction of one item, by {'tokens' if style == '-o' else 'nodes'}"
        right.plot([r[axis_key] for r in rows], costs, style, color="C3", label=label)
    right.axhline(72, color="grey", linestyle=":", label="SGLang Rust, an eviction call, 4 M pool")
    right.set_ylabel("microseconds")
    right.set(xscale="log", yscale="log", xlabel="cached tokens, or nodes", ylim=(1, 1000))
    right.set_title("Growth with the tree")
    right.legend(fontsize=7, ncols=2, loc="upper left")
    figure.supxlabel(
        f"Left: means of {short['runs']} runs on two shared cores beside what SGLang reports of "
        "its own trees on a machine of the same "
        "class.\nRight: medians of the quietest run; a flat line is a cost that does not grow with "
        "the tree.",
        fontsize=8,
    )
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURES / "bench_tree.png", dpi=130)
