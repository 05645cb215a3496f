"""Is one policy without a knob good everywhere? `regret` with its own placement against a goal on
every workload.

Every goal is a token hit rate of an online policy at one size. The goals were set on caches that
may stop at any token, so the first table has grid 1: beside the goal the bound (an infinite
token-granular cache), the best plan with hindsight in the same memory, and LRU with the default
placement and with the best of a few for this row, chosen with hindsight, so that what placement
gains and what eviction gains are told apart. The second table has the engine's grid, 64: what the
grid itself costs (between the bounds at both grids), how much of its bound is reached, and the best
of all rebuilt peers in the same memory, with float32 and with bfloat16 states for both.

    python -m experiments.goals_table --resume out/goals      # writes results/goals_table.jsonl and
    .md; may be interrupted python -m experiments.goals_table --policy lru --checkpoints
    branch,backoff --peers none       # prints another policy's table
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.hindsight import Hindsights
from experiments.lab import GB, MARCONI_7B, QWEN3_NEXT, keep
from experiments.provenance import RESULTS, ROOT, read_json_lines
from hybridcache import (
    BASELINES,
    InfiniteCache,
    Job,
    ModelGeometry,
    Roofline,
    RunConfig,
    Serving,
    Trace,
    open_trace,
    run_sweep,
)
from hybridcache.lab.simulation.sizes import budget_bytes
from hybridcache.lab.simulation.sweep import collect_seldom
from hybridcache.lab.simulation.target import DEFAULT_CHECKPOINTS, check_words
from hybridcache.units import GIB

OURS = "regret"
"""Eviction and placement."""
LRU_PLACEMENTS = (
    DEFAULT_CHECKPOINTS,
    "regret",
    "backoff",
    "end",
    "branch,backoff",
    "balanced:4",
)
"""Placements that LRU is tried with."""
PEERS = tuple(BASELINES)
TUNED = ("marconi", "marconi-artifact", "marconi-repaired")
"""They replay their beginning 21 times to tune alpha."""
LONG_PEERS = tuple(word for word in PEERS if word not in (*TUNED, "lightllm-64"))
"""For long traces: Marconi with alpha at its fixed middle only, and no pages of 64 tokens whose
states are not counted (slow)."""
HOSTED = tuple(
    word for word in PEERS if word.startswith("lightllm") and not word.endswith("-counted")
)
"""Peers whose states stand in host memory beside the budget."""
ENGINE_GRID = 64
HALF = "bfloat16"
MOONCAKE = "data/traces/mooncake_conversation_trace.jsonl.gz"
CODING = "data/traces/weka_claude_code_train.rle.jsonl.gz?starts=fixed:0.002"


@dataclass(frozen=True, slots=True)
class Goal:
    """One cell of the table: a workload at a size, and the token hit rate to reach there."""

    name: str
    spec: str
    goal: float | None
    """None: above every peer."""
    gib: float | None = None
    pools: tuple[int, int] | None = None
    """KV tokens and state slots, where the two are split; else one budget of ``gib``."""
    geometry: ModelGeometry = QWEN3_NEXT
    head: int | None = None
    """Only the first so many requests."""
    peers: tuple[str, ...] = PEERS
    share_of_optimum: float | None = None
    """The goal as a share of the offline optimum, where it is stated so."""

    def config(self, grid: int, state_dtype: str | None = None, **words: str) -> RunConfig:
        """A run of this cell. Where the two are split, states of another size share the same
        bytes."""
        geometry = self.geometry.with_state_dtype(state_dtype or self.geometry.state_dtype)
        if self.pools is not None:
            num_kv_tokens, num_slots = self.pools
            num_slots = num_slots * self.geometry.state_bytes // geometry.state_bytes
            return RunConfig(
                geometry, num_kv_tokens=num_kv_tokens, num_slots=num_slots, grid=grid, **words
            )
        assert self.gib is not None
        return RunConfig(geometry, budget_bytes(self.gib), grid=grid, **words)

    def config_with_states_beside(self, **words: str) -> RunConfig:
        """KV alone in the budget, and more slots for states beside it than are ever filled: what
        ``HOSTED`` peers have."""
        num_kv_tokens = budget_bytes(self.total_gib) // self.geometry.kv_bytes_per_token
        return RunConfig(
            self.geometry,
            num_kv_tokens=num_kv_tokens,
            num_slots=100_000,
            grid=ENGINE_GRID,
            **words,
        )

    @property
    def total_gib(self) -> float:
        """Of both pools, where there are two."""
        if self.gib is not None:
            return self.gib
        assert self.pools is not None
        num_kv_tokens, num_slots = self.pools
        kv_bytes = num_kv_tokens * self.geometry.kv_bytes_per_token
        return (kv_bytes + num_slots * self.geometry.state_bytes) / GIB

    def trace(self) -> Trace:
        trace = open_trace(self.spec)
        return (trace if self.head is None else trace.head(self.head)).kept()


GOALS = (
    Goal("chat 40", "chat", 0.91, 40),
    Goal("chat 6", "chat", 0.85, 6),
    Goal("few-shot 40", "few-shot", 0.65, 40),
    Goal("agent 40", "agent", 0.955, 40),
    Goal("agent 6", "agent", 0.95, 6),
    Goal("branch 40", "branch", 0.915, 40),
    Goal("resend 40", "resend", 0.66, 40),
    Goal("resend 6", "resend", 0.62, 6),
    Goal("short 40", "short", 0.84, 40),
    *(
        Goal(
            f"conversations, live {live}",
            f"conversations?live={live}",
            goal,
            pools=(1_070_000, 320),
            peers=LONG_PEERS,
        )
        for live, goal in ((64, 0.80), (128, 0.79), (256, 0.77))
    ),
    Goal(
        "ShareGPT-like 5 GB",
        "sharegpt-like",
        None,
        5 * GB,
        geometry=MARCONI_7B,
        share_of_optimum=0.6,
    ),
    Goal("Mooncake 80 GB", MOONCAKE, 0.114, 80 * GB, peers=LONG_PEERS),
    Goal("Mooncake 320 GB", MOONCAKE, 0.279, 320 * GB, peers=LONG_PEERS),
    *(
        Goal(f"coding agent {gib} GiB", CODING, None, gib, head=2000, peers=LONG_PEERS)
        for gib in (40, 80, 160, 320, 640)
    ),
)


@dataclass(frozen=True, slots=True)
class Ours:
    """Whose table it is."""

    policy: str = OURS
    checkpoints: str = OURS

    @property
    def name(self) -> str:
        return OURS if self == Ours() else f"{self.policy} @ {self.checkpoints}"


def measure(
    goal: Goal, peers: Sequence[str], ours: Ours, folder: Path | None = None
) -> dict[str, Any]:
    """One row. ``folder`` keeps every run as it is done, and has those of an earlier call;
    ``peers``: only these of the goal's."""
    trace = goal.trace()
    words = {"policy": ours.policy, "checkpoints": ours.checkpoints}
    peers = [word for word in goal.peers if word in peers]
    grids = {grid: max(grid, trace.unit) for grid in (1, ENGINE_GRID)}
    with_lru = {
        grid: {placed: goal.config(at, checkpoints=placed) for placed in LRU_PLACEMENTS}
        for grid, at in grids.items()
    }
    with_ours = {grid: goal.config(at, **words) for grid, at in grids.items()}
    half = goal.config(grids[ENGINE_GRID], HALF, **words)
    beside = goal.config_with_states_beside(**words)
    full_peers = {word: goal.config(ENGINE_GRID, baseline=word) for word in peers}
    half_peers = {
        word: goal.config(ENGINE_GRID, HALF, baseline=word) for word in peers if word not in HOSTED
    }
    rates = Rates(goal, trace, folder)
    rates.work_out(
        [
            *with_ours.values(),
            half,
            beside,
            *(config for by_words in with_lru.values() for config in by_words.values()),
            *full_peers.values(),
            *half_peers.values(),
        ]
    )
    plan = Hindsights(trace).at(goal.total_gib, goal.geometry, 1, proven=True)
    row: dict[str, Any] = {
        "goal": goal.name,
        "requests": plan.requests,
        "state_dtype": goal.geometry.state_dtype,
        "bound": bound(trace, 1),
        "bound_grid_64": bound(trace, ENGINE_GRID),
        "plan": plan.reached,
        "no_plan_passes": plan.bound,
        "ours": rates.of(with_ours[1]),
        "ours_grid_64": rates.of(with_ours[ENGINE_GRID]),
        "ours_bfloat16": rates.of(half),
        "ours_states_beside": rates.of(beside),
        "lru": {placed: rates.of(config) for placed, config in with_lru[1].items()},
        "lru_grid_64": {
            placed: rates.of(config) for placed, config in with_lru[ENGINE_GRID].items()
        },
        "peers": {word: rates.of(config) for word, config in full_peers.items()},
        "peers_bfloat16": {word: rates.of(config) for word, config in half_peers.items()},
    }
    if goal.share_of_optimum is not None:
        row["optimum"] = optimum_rate(goal, trace, folder)
        row["plan"] = max(row["plan"], row["optimum"])
    row["share_of_plan"] = row["ours"] / row["plan"]
    row["wanted"] = wanted(goal, row)
    return row


class Rates:
    """Token hit rates of the runs of one row, each worked out once."""

    def __init__(self, goal: Goal, trace: Trace, folder: Path | None) -> None:
        self._trace, self._serving = trace, Serving(Roofline.fitting(goal.geometry))
        self._path = None if folder is None else folder / f"{goal.name.replace(' ', '-')}.jsonl"
        self._rates: dict[RunConfig, float] = {}

    def work_out(self, configs: Iterable[RunConfig]) -> None:
        todo = list(dict.fromkeys(configs))
        jobs = [Job(config, self._serving) for config in todo]
        results = run_sweep(self._trace, jobs, resume_from=self._path)
        for config, result in zip(todo, results, strict=True):
            self._rates[config] = result.token_hit_rate

    def of(self, config: RunConfig) -> float:
        return self._rates[config]


def wanted(goal: Goal, row: dict[str, Any]) -> float | None:
    """The token hit rate to reach: stated, a share of the optimum, or that of the best peer in the
    same memory."""
    if goal.share_of_optimum is not None:
        return float(goal.share_of_optimum * row["optimum"])
    if goal.goal is not None:
        return goal.goal
    best = best_peer(row["peers"])
    return None if best is None else best[0]


def best_peer(peers: dict[str, float]) -> tuple[float, str] | None:
    """The best of those that have no memory beside the budget (39.6 GB; with big pages as much as
    they like)."""
    return max(((rate, word) for word, rate in peers.items() if word not in HOSTED), default=None)


def bound(trace: Trace, grid: int) -> float:
    """Token hit rate of an infinite cache that may resume at multiples of ``grid`` tokens."""
    cache = InfiniteCache()
    step = max(1, grid // trace.unit)
    reused = total = 0
    for request in trace:
        tokens = request.num_tokens(trace.unit)
        seen = min(cache.serve(request).length, len(request.tokens))
        if step == 1:
            reused += min(seen * trace.unit, tokens - 1)
        else:
            reused += min(seen, len(request.tokens) - 1) // step * step * trace.unit
        total += tokens
    return reused / total


def optimum_rate(goal: Goal, trace: Trace, folder: Path | None) -> float:
    """Token hit rate of the best offline plan found (MILP, gap within half a percent for some
    hundred requests); kept in ``folder``."""
    from hybridcache import optimum

    assert goal.gib is not None
    kept = None if folder is None else folder / "optimum.json"
    if kept is not None and kept.exists():
        return float(json.loads(kept.read_text(encoding="utf-8"))[goal.name])
    best = optimum(
        trace,
        capacity_bytes=budget_bytes(goal.gib),
        kv_bytes_per_token=goal.geometry.kv_bytes_per_token,
        state_bytes=goal.geometry.state_bytes,
        grid=1,
        method="milp",
        limit_s=120,
    )
    prompt_tokens = sum(request.num_tokens(trace.unit) for request in trace)
    rate = float(best.cached_tokens.sum()) / prompt_tokens
    if kept is not None:
        kept.write_text(json.dumps({goal.name: rate}), encoding="utf-8")
    return rate


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
            f"{row['lru'][DEFAULT_CHECKPOINTS]:.3f} | {best_lru(row['lru'])} "
            f"| {row['ours']:.3f} | {100 * row['share_of_plan']:.1f} | "
            f"{verdict(row, 'ours', 'bound')} |"
        )
    yield ""
    yield (
        "The best plan with hindsight is the clairvoyant greedy's, in the same memory; up to 700 "
        "requests the LP proves what no plan passes "
        f"(ShareGPT-like: the MILP's plan). LRU alone places `{DEFAULT_CHECKPOINTS}`; its best "
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
    return f"{rate:.3f} {'default' if words == DEFAULT_CHECKPOINTS else words}"


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
