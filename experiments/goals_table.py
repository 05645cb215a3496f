"""Is one policy without a knob good everywhere? `regret` with its own placement against a goal on every workload.

Every goal is a token hit rate of an online policy at one size; beside it the bound (an infinite token-granular cache), the best
plan with hindsight in the same memory, and the best rebuilt peer there. `python -m experiments.goals_table` writes
results/goals_table.jsonl and .md; with `--policy` or `--checkpoints` it prints the table of another policy and writes nothing.

The goals were set on caches that may stop at any token, so the grid is 1; the column "grid 64" is the same policy where
checkpoints stand on the kernels' 64-token grid, and what an infinite cache reaches there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from experiments.hindsight import Hindsights
from experiments.lab import GB, MARCONI_7B, QWEN3_NEXT, keep
from experiments.provenance import RESULTS, ROOT, read_json_lines
from hybridcache.costs import ModelGeometry, Roofline
from hybridcache.infinite import InfiniteCache
from hybridcache.simulation.result import RunResult, budget_bytes
from hybridcache.simulation.serving import Serving
from hybridcache.simulation.sweep import Job, run_sweep
from hybridcache.simulation.target import GIB, RunConfig, check_words
from hybridcache.trace import Trace
from hybridcache.traces import open_trace

OURS = "regret"
"""Eviction and placement."""
PEERS = (
    "vllm",
    "vllm-unit32",
    "sglang",
    "sglang-cap",
    "lightllm",
    "lightllm-big",
    "lightllm-counted",
    "lightllm-big-counted",
    "marconi",
    "marconi-artifact",
)
LONG_PEERS = (*PEERS[:-2], "marconi-static")
"""For long prompts, where tuning alpha means replaying 21 times: its fixed middle."""
HOSTED = ("lightllm", "lightllm-big")
"""Peers whose states stand in host memory beside the budget."""
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

    def config(self, grid: int, **words: str) -> RunConfig:
        if self.pools is not None:
            num_kv_tokens, num_slots = self.pools
            return RunConfig(
                self.geometry, num_kv_tokens=num_kv_tokens, num_slots=num_slots, grid=grid, **words
            )
        assert self.gib is not None
        return RunConfig(self.geometry, budget_bytes(self.gib), grid=grid, **words)

    def config_with_states_beside(self, **words: str) -> RunConfig:
        """KV alone in the budget, and more slots for states beside it than are ever filled: what ``HOSTED`` peers have."""
        assert self.gib is not None
        num_kv_tokens = budget_bytes(self.gib) // self.geometry.kv_bytes_per_token
        return RunConfig(
            self.geometry, num_kv_tokens=num_kv_tokens, num_slots=100_000, grid=64, **words
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


def run(goal: Goal, trace: Trace, config: RunConfig) -> RunResult:
    (result,) = run_sweep(trace, [Job(config, Serving(Roofline.fitting(goal.geometry)))])
    return result


def measure(goal: Goal, peers: bool, policy: str, checkpoints: str) -> dict[str, Any]:
    """One row: ours at grid 1 and 64, the bounds, the best plan at grid 1, every peer."""
    trace = goal.trace()
    ours = {
        grid: run(goal, trace, goal.config(grid, policy=policy, checkpoints=checkpoints))
        for grid in (1, 64)
    }
    plan = Hindsights(trace).at(goal.total_gib, goal.geometry, 1, proven=True)
    lru = run(goal, trace, goal.config(1))
    row: dict[str, Any] = {
        "goal": goal.name,
        "wanted": goal.goal,
        "bound": bound(trace, 1),
        "bound_grid_64": bound(trace, 64),
        "plan": plan.reached,
        "no_plan_passes": plan.bound,
        "ours": ours[1].token_hit_rate,
        "ours_grid_64": ours[64].token_hit_rate,
        "lru": lru.token_hit_rate,
        "requests": ours[1].requests,
        "peers": {
            word: run(goal, trace, goal.config(64, baseline=word)).token_hit_rate
            for word in goal.peers
            if peers and goal.pools is None
        },
    }
    if goal.pools is None:
        beside = goal.config_with_states_beside(policy=policy, checkpoints=checkpoints)
        row["ours_states_beside"] = run(goal, trace, beside).token_hit_rate
    if goal.share_of_optimum is not None:
        row["optimum"] = optimum_rate(goal, trace)
        row["plan"] = max(row["plan"], row["optimum"])
    row["share_of_plan"] = row["ours"] / row["plan"]
    row["wanted"] = wanted(goal, row)
    return row


def wanted(goal: Goal, row: dict[str, Any]) -> float | None:
    """The token hit rate to reach: stated, a share of the optimum, or that of the best peer in the same memory."""
    if goal.share_of_optimum is not None:
        return float(goal.share_of_optimum * row["optimum"])
    if goal.goal is not None:
        return goal.goal
    return max(peers_in_budget(row).values(), default=None)


def peers_in_budget(row: dict[str, Any]) -> dict[str, float]:
    """All but those that have memory beside the budget (39.6 GB; with big pages as much as they like)."""
    return {word: rate for word, rate in row["peers"].items() if word not in HOSTED}


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


def optimum_rate(goal: Goal, trace: Trace) -> float:
    """Token hit rate of the best offline plan found (MILP, gap within half a percent for some hundred requests)."""
    from hybridcache.optimum import optimum

    assert goal.gib is not None
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
    return float(best.cached_tokens.sum()) / prompt_tokens


def table(rows: list[dict[str, Any]], name: str = "regret") -> Iterator[str]:
    """The rows as markdown."""
    yield (
        f"| workload | bound | best plan (no plan passes) | best peer rebuilt | LightLLM* | {name}* | LRU | wanted | {name} | | "
        f"% of the plan | {name}, grid 64 (bound there) |"
    )
    yield "|---" * 12 + "|"
    for row in rows:
        peer = max(peers_in_budget(row).items(), key=lambda item: item[1], default=None)
        best = f"{peer[1]:.3f} {peer[0]}" if peer else ""
        hosted = [rate for word, rate in row["peers"].items() if word in HOSTED]
        beside = row.get("ours_states_beside")
        goal, proven = row["wanted"], row["no_plan_passes"]
        reached = "" if goal is None else "reached" if row["ours"] >= goal else "missed"
        yield (
            f"| {row['goal']} | {row['bound']:.3f} | {row['plan']:.3f}{f' ({proven:.3f})' if proven else ''} | {best} "
            f"| {f'{max(hosted):.3f}' if hosted else ''} | {f'{beside:.3f}' if beside else ''} | {row['lru']:.3f} "
            f"| {'' if goal is None else f'{goal:.3f}'} | {row['ours']:.3f} | {reached} | {100 * row['share_of_plan']:.1f} "
            f"| {row['ours_grid_64']:.3f} ({row['bound_grid_64']:.3f}) |"
        )
    yield ""
    yield (
        "The best plan with hindsight is the clairvoyant greedy's, in the same memory; up to 700 requests the LP proves what no plan passes "
        "(ShareGPT-like: the MILP's plan)."
    )
    yield ""
    yield (
        "\\* With states in host memory that the size does not count, as LightLLM has them: 39.6 GB, or one state every 1,024 "
        f"tokens; {name} with as many as it likes, grid 64. Not compared with: the best peer may be a LightLLM whose states are counted."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", default="", help="rows whose name contains this; nothing is written"
    )
    parser.add_argument(
        "--render", action="store_true", help="only write the table of the results there are"
    )
    parser.add_argument(
        "--no-peers", action="store_true", help="leave the peers out; nothing is written"
    )
    parser.add_argument("--policy", default=OURS, help="eviction: a word or module:Class")
    parser.add_argument("--checkpoints", default=OURS, help="placement: words or module:Class")
    options = parser.parse_args()
    check_words(RunConfig(QWEN3_NEXT, policy=options.policy, checkpoints=options.checkpoints))
    is_ours = options.policy == options.checkpoints == OURS
    if options.render:
        _, kept = read_json_lines(RESULTS / "goals_table.jsonl")
        named = {goal.name: goal for goal in GOALS}
        again = [row | {"wanted": wanted(named[row["goal"]], row)} for row in kept]
        write_table(again)
        return
    goals = [
        goal
        for goal in GOALS
        if options.only in goal.name
        and (not goal.spec.startswith("data/") or (ROOT / goal.spec.split("?")[0]).exists())
    ]
    rows = []
    for goal in (bar := tqdm(goals, disable=None)):
        bar.set_description(goal.name)
        rows.append(measure(goal, not options.no_peers, options.policy, options.checkpoints))
    if options.only or options.no_peers or not is_ours:
        name = OURS if is_ours else f"{options.policy} @ {options.checkpoints}"
        print("\n".join(table(rows, name)))
        return
    keep("goals_table", rows)
    write_table(rows)


def write_table(rows: list[dict[str, Any]]) -> None:
    text = "\n".join(table(rows))
    (RESULTS / "goals_table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
