"""Is one policy without a knob good everywhere? `regret` with its own placement against a goal on
every workload.

Every goal is a token hit rate of an online policy at one size. The goals were set on caches that
may stop at any token, so the first table has grid 1: beside the goal the bound (an infinite
token-granular cache), the best plan with hindsight in the same memory, and LRU with the default
placement and with the best of a few for this row, chosen with hindsight, so that what placement
gains and what eviction gains are told apart. The second table has the engine's grid, 64: what the
grid itself costs (between the bounds at both grids), how much of its bound is reached, and the best
of all rebuilt peers in the same memory, with float32 and with bfloat16 states for both.

    python -m experiments.goals_table --resume out/goals
    python -m experiments.goals_table --policy lru --checkpoints branch,backoff --peers none

The first writes results/goals_table.jsonl and .md, and may be interrupted; the second prints the
table of another policy.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.goals import (
    ENGINE_GRID,
    GOALS,
    HALF,
    HOSTED,
    LRU_PLACEMENTS,
    OURS,
    PEERS,
    TUNED,
    Ours,
    best_peer,
    measure,
    wanted,
)
from experiments.lab import QWEN3_NEXT, STATIC_PLACEMENT, keep
from experiments.provenance import RESULTS, ROOT, read_json_lines
from hybridcache.lab.simulation.sweep import collect_seldom
from hybridcache.lab.simulation.target import RunConfig, check_words


def table(rows: list[dict[str, Any]], name: str = OURS) -> Iterator[str]:
    """The rows as markdown: both grids."""
    yield from token_table(rows, name)
    yield ""
    yield from engine_table(rows, name)
    yield ""
    yield (
        "\\* With states in host memory that the size does not count, as LightLLM has them: 39.6 "
        "GB, or one state every 1,024 "
        f"tokens; {name} with as many as it likes, grid {ENGINE_GRID}. Not compared with: the best "
        "peer may be a LightLLM whose "
        "states are counted."
    )


def reached(rows: list[dict[str, Any]], column: str) -> str:
    stated = [row for row in rows if row["wanted"] is not None]
    return f"{sum(row[column] >= row['wanted'] for row in stated)} of {len(stated)} goals reached"


def share_of_bound(row: dict[str, Any]) -> float:
    """Of what an infinite cache on the engine's grid reaches."""
    return float(row["ours_grid_64"] / row["bound_grid_64"])


def beyond(rows: list[dict[str, Any]]) -> str:
    """What is reached where no cache on the engine's grid can reach the goal; empty where there is
    no such row."""
    out_of_reach = [
        row for row in rows if row["wanted"] is not None and row["wanted"] > row["bound_grid_64"]
    ]
    if not out_of_reach:
        return ""
    shares = [100 * share_of_bound(row) for row in out_of_reach]
    return (
        f"{len(out_of_reach)} lie above what an infinite cache reaches on this grid: of that, "
        f"{min(shares):.1f} to {max(shares):.1f} % is reached. "
    )


def verdict(row: dict[str, Any], column: str, bound: str) -> str:
    wanted = row["wanted"]
    if wanted is None:
        return " |"
    if row[column] >= wanted:
        return f"{wanted:.3f} | reached"
    out_of_reach = wanted > row[bound]
    return f"{wanted:.3f} | missed{': no cache reaches it on this grid' if out_of_reach else ''}"


def token_table(rows: list[dict[str, Any]], name: str) -> Iterator[str]:
    """Grid 1: bounds, plan, LRU, goal."""
    reached_1 = reached(rows, "ours")
    yield f"**Grid 1**, caches that may stop at any token, as the goals were set: {reached_1}."
    yield ""
    yield (
        "| workload | bound | best plan (no plan passes) | LRU | LRU @ the best placement for the "
        "row "
        f"| {name} | % of the plan | wanted | |"
    )
    yield "|---" * 9 + "|"
    for row in rows:
        proven = row["no_plan_passes"]
        plan = f"{row['plan']:.3f}" + (f" ({proven:.3f})" if proven else "")
        yield (
            f"| {row['goal']} | {row['bound']:.3f} | {plan} | "
            f"{row['lru'][STATIC_PLACEMENT]:.3f} | {best_lru(row['lru'])} "
            f"| {row['ours']:.3f} | {100 * row['share_of_plan']:.1f} | "
            f"{verdict(row, 'ours', 'bound')} |"
        )
    yield ""
    yield (
        "The best plan with hindsight is the clairvoyant greedy's, in the same memory; up to 700 "
        "requests the LP proves what no plan passes "
        f"(ShareGPT-like: the MILP's plan). LRU alone places `{STATIC_PLACEMENT}`; its best "
        "placement is chosen with hindsight "
        f"among that and {', '.join(f'`{words}`' for words in LRU_PLACEMENTS[1:])}."
    )


def engine_table(rows: list[dict[str, Any]], name: str) -> Iterator[str]:
    """Grid 64: the same goals, and the peers with states of both sizes."""
    counts = reached(rows, "ours_grid_64")
    yield (
        f"**Grid {ENGINE_GRID}**, the engine's: {counts} with float32 states. {beyond(rows)}"
        "Points: what the grid costs any cache, and the difference to the best peer."
    )
    yield ""
    yield (
        f"| workload | bound | the grid costs | LRU @ the best placement for the row | {name}, "
        "float32 | % of the bound | wanted | "
        f"| best peer, float32 | | {name}, bfloat16 | best peer, bfloat16 | | LightLLM* | {name}* |"
    )
    yield "|---" * 15 + "|"
    for row in rows:
        only_half = row["state_dtype"] == HALF
        full, of_full, against_full = _beside(row["ours_grid_64"], row["peers"])
        half, of_half, against_half = _beside(row["ours_bfloat16"], row["peers_bfloat16"])
        if only_half:
            full, of_full, against_full = "", "", ""
        hosted = [rate for word, rate in row["peers"].items() if word in HOSTED]
        yield (
            f"| {row['goal']} | {row['bound_grid_64']:.3f} | "
            f"{100 * (row['bound'] - row['bound_grid_64']):.1f} "
            f"| {best_lru(row['lru_grid_64'])} | {full} | {100 * share_of_bound(row):.1f} "
            f"| {verdict(row, 'ours_grid_64', 'bound_grid_64')} | {of_full} | {against_full} | "
            f"{half} | {of_half} | {against_half} "
            f"| {f'{max(hosted):.3f}' if hosted else ''} | {row['ours_states_beside']:.3f} |"
        )
    yield ""
    yield (
        f"Peers: the best of {', '.join(word for word in PEERS if word not in HOSTED)}, in the "
        "same memory, each on the pages and "
        f"chunks it has; on long traces (live, Mooncake, coding agent) without {', '.join(TUNED)}, "
        "which tune themselves by replay. "
        "Where KV and states are split for us (live), the peers share out the same bytes as they "
        "do. ShareGPT-like has 16-bit states "
        "only. An id of Mooncake stands for 512 tokens and one of the coding agents for 64, which "
        "is their grid in both tables."
    )


def best_lru(rates: dict[str, float]) -> str:
    words, rate = max(rates.items(), key=lambda item: item[1])
    return f"{rate:.3f} {'default' if words == STATIC_PLACEMENT else words}"


def _beside(ours: float, peers: dict[str, float]) -> tuple[str, str, str]:
    best = best_peer(peers)
    if best is None:
        return f"{ours:.3f}", "", ""
    return f"{ours:.3f}", f"{best[0]:.3f} {best[1]}", f"{100 * (ours - best[0]):+.1f}"


def main() -> None:
    collect_seldom()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", default="", help="rows whose name contains this; nothing is written"
    )
    parser.add_argument(
        "--render", action="store_true", help="only write the table of the results there are"
    )
    parser.add_argument(
        "--peers", default="all", help="words, commas between, or none; nothing is written"
    )
    parser.add_argument("--policy", default=OURS, help="eviction: a word or module:Class")
    parser.add_argument("--checkpoints", default=OURS, help="placement: words or module:Class")
    parser.add_argument(
        "--resume", type=Path, help="folder that keeps every run until the table is done"
    )
    options = parser.parse_args()
    ours = Ours(options.policy, options.checkpoints)
    check_words(RunConfig(QWEN3_NEXT, policy=ours.policy, checkpoints=ours.checkpoints))
    if options.render:
        _, kept = read_json_lines(RESULTS / "goals_table.jsonl")
        named = {goal.name: goal for goal in GOALS}
        write_table([row | {"wanted": wanted(named[row["goal"]], row)} for row in kept])
        return
    if options.resume is not None:
        options.resume.mkdir(parents=True, exist_ok=True)
    goals = [
        goal
        for goal in GOALS
        if options.only in goal.name
        and (not goal.spec.startswith("data/") or (ROOT / goal.spec.split("?")[0]).exists())
    ]
    peers = PEERS if options.peers == "all" else options.peers.split(",")
    rows = []
    for goal in (bar := tqdm(goals, disable=None)):
        bar.set_description(goal.name)
        rows.append(measure(goal, peers, ours, options.resume))
    if options.only or options.peers != "all" or ours != Ours():
        print("\n".join(table(rows, ours.name)))
        return
    keep("goals_table", rows)
    write_table(rows)


def write_table(rows: list[dict[str, Any]]) -> None:
    text = "\n".join(table(rows))
    (RESULTS / "goals_table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
