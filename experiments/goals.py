"""The workloads of the goals table, what is wanted of each, and how one row is measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.hindsight import Hindsights
from experiments.lab import GB, MARCONI_7B, QWEN3_NEXT, STATIC_PLACEMENT
from hybridcache import ModelGeometry, Trace, open_trace
from hybridcache.geometry.times import Roofline
from hybridcache.geometry.units import GIB
from hybridcache.lab.baselines import BASELINES
from hybridcache.lab.infinite import InfiniteCache
from hybridcache.lab.simulation.serving import Serving
from hybridcache.lab.simulation.sizes import budget_bytes
from hybridcache.lab.simulation.sweep import Job, run_sweep
from hybridcache.lab.simulation.target import RunConfig

OURS = "regret"
"""Eviction and placement."""
LRU_PLACEMENTS = (
    STATIC_PLACEMENT,
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
        due = list(dict.fromkeys(configs))
        jobs = [Job(config, self._serving) for config in due]
        results = run_sweep(self._trace, jobs, resume_from=self._path)
        for config, result in zip(due, results, strict=True):
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
