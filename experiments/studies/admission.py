"""Sweep admission policies over the rate of sessions, in closed loop.

    python -m experiments.studies.admission [--seeds 5] [--processes 2]

Above some rate the hit rate collapses. The study compares that rate between policies on five agent
and four chat workloads at five rates each, with the default pair of policies.

Three workloads replay sessions of published traces. Their files are looked up in ``data/``, and a
missing one is skipped. Seeds, rates and memory are declared in ``splits.toml``.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from experiments.provenance import ROOT
from experiments.studies import common
from experiments.tables import Cell, Column, Table
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.units import GIB
from hybridcache.lab.runs.closed_loop import run_closed_loop
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.traces.intervals import paired, ratio
from hybridcache.lab.traces.trace import Trace, TraceRequest

SPLITS_FILE = ROOT / "experiments" / "splits.toml"
SPLITS = tomllib.loads(SPLITS_FILE.read_text(encoding="utf-8"))["admission"]
VOCABULARY = 50_000
UNLIMITED = ("oldest", "sessions")
REBUILT = (*common.REBUILT, "marconi-static-64", "sglang-session")
"""Rebuilt systems, Marconi with states at the engine's grid, as kernels can save them, and SGLang
with named sessions that clients end."""
CACHES = (common.LRU_ADAPTIVE, *REBUILT)
"""Caches that are compared with the default pair. `lru@adaptive` is served with `sessions`; rebuilt
systems admit in the order of arrival."""


@dataclass(frozen=True, slots=True)
class LinearSteps:
    """Step times that are linear in the number of tokens."""

    step_s: float = 0.006
    prefill_token_s: float = 1 / 8000
    decode_token_s: float = 0.0004

    def describe(self) -> str:
        """Describe the three coefficients in one line."""
        return (
            f"{1e3 * self.step_s:g} ms a step, {1e3 * self.prefill_token_s:g} ms a prompt token, "
            f"{1e3 * self.decode_token_s:g} ms a decoded one"
        )

    def step_seconds(
        self, prefills: Sequence[tuple[int, int]], num_decodes: int, context: int
    ) -> float:
        """See ``StepTimes``."""
        num_tokens = sum(end - start for start, end in prefills)
        return self.step_s + num_tokens * self.prefill_token_s + num_decodes * self.decode_token_s


@dataclass(frozen=True, slots=True)
class Kind:
    """Shape of the sessions of one workload. Pairs are minimum and maximum, in tokens."""

    first: tuple[int, int]
    turns: tuple[int, int]
    added: tuple[int, int]
    answer: tuple[int, int]
    pause_s: tuple[float, float]
    """Median, and standard deviation of the logarithm."""
    head: int = 0
    """Tokens of the system prompt, which is one of ``num_heads``."""
    num_heads: int = 1


@dataclass(frozen=True, slots=True)
class MixedLoad:
    """Sessions of one or several kinds, and the engine that serves them."""

    num_sessions: int
    num_rows: int
    """KV rows that the memory holds."""
    fixed: tuple[int, ...]
    """Fixed numbers of live sessions for comparison."""
    kinds: tuple[Kind, ...] = ()
    """Kinds of equal parts of the sessions, in order of time. Empty for a published trace."""
    file: str = ""
    """Published trace, with options."""
    token_budget: int = 2048

    @property
    def is_available(self) -> bool:
        return not self.file or common.published(self.file) is not None

    def trace(self, name: str, seed: int) -> Trace:
        """Return the sessions of ``seed``, or those of the file."""
        if self.file:
            read = common.opened(self.file)
            return Trace(name, read.unit, read.__iter__)
        requests = tuple(self._requests(np.random.default_rng(seed)))
        return Trace(name, 1, requests.__iter__)

    def _requests(self, rng: np.random.Generator) -> Iterator[TraceRequest]:
        def text(lengths: tuple[int, int]) -> np.ndarray:
            return rng.integers(0, VOCABULARY, rng.integers(*lengths, endpoint=True), np.int32)

        heads = {
            kind: [text((kind.head, kind.head)) for _ in range(kind.num_heads)]
            for kind in self.kinds
        }
        for session in range(self.num_sessions):
            kind = self.kinds[session * len(self.kinds) // self.num_sessions]
            head = heads[kind][session % kind.num_heads]
            tokens, now_s = np.concatenate((head, text(kind.first))), 0.0
            boundaries = (kind.head,) if kind.head else ()
            for _ in range(rng.integers(*kind.turns, endpoint=True)):
                tokens, answer = np.concatenate((tokens, text(kind.added))), text(kind.answer)
                yield TraceRequest(now_s, session, None, tokens, answer, boundaries)
                tokens = np.concatenate((tokens, answer))
                median, spread = kind.pause_s
                now_s += float(rng.lognormal(np.log(median), spread))


AGENT = Kind((2000, 6000), (6, 30), (100, 700), (30, 120), (4.0, 0.9))
LONG_PROMPTS = Kind((15_000, 30_000), (5, 15), (200, 1500), (30, 120), (4.0, 0.9))
SHORT_PROMPTS = Kind((500, 1500), (3, 10), (50, 300), (30, 120), (15.0, 1.0))
CODING = Kind((500, 3000), (10, 40), (100, 1500), (30, 250), (3.0, 1.2), 8000)
CHAT = Kind((0, 100), (3, 16), (20, 300), (100, 500), (25.0, 1.0), 1500, 4)
SHORT_CHAT = Kind((0, 50), (1, 10), (20, 200), (100, 600), (30.0, 1.0), 300)
LONG_CHAT = Kind((500, 4000), (3, 16), (50, 800), (100, 500), (25.0, 1.0), 1500, 4)
# A byte counts as a token here, so the load is high enough to matter. With Qwen's tokens,
# which are fewer, no request is held back at rates of 0.1, 0.2 and 0.5 (seed 11).
TAU_BENCH = "agent/taubench_gpt-4o-airline.json.gz?tokenizer=bytes&head=800"
CLAUDE_CODE = "traces/weka_claude_code_train.rle.jsonl.gz?head=700"
SHAREGPT = "traces/sharegpt_qwen35_turns.jsonl.gz?cap=8192&head=1200"
CHANGING = (AGENT, LONG_PROMPTS, SHORT_PROMPTS)
WORKLOADS = {
    "agents": MixedLoad(60, 260_000, (10, 14, 18, 24), (AGENT,)),
    "changing agents": MixedLoad(60, 260_000, (6, 10, 14, 20), CHANGING),
    "coding agents": MixedLoad(40, 300_000, (8, 12, 16, 24), (CODING,)),
    "chats": MixedLoad(120, 160_000, (24, 32, 48, 64), (CHAT,)),
    "short chats": MixedLoad(150, 160_000, (24, 32, 48, 64), (SHORT_CHAT,)),
    "long chats": MixedLoad(100, 200_000, (16, 24, 34, 48), (LONG_CHAT,)),
    "airline agents (tau-bench)": MixedLoad(78, 160_000, (8, 12, 18, 26), file=TAU_BENCH),
    "Claude Code": MixedLoad(34, 800_000, (6, 9, 13, 18), file=CLAUDE_CODE, token_budget=8192),
    "ShareGPT chats": MixedLoad(517, 160_000, (16, 24, 36, 54), file=SHAREGPT),
}


FIGURES = ("prompt_tokens", "cached_tokens", "ttft_mean_s", "ttft_p99_s", "makespan_s")


def admissions(name: str) -> tuple[str, ...]:
    return *UNLIMITED, *(f"live:{limit}" for limit in WORKLOADS[name].fixed)


def scenario(workload: MixedLoad, name: str, seed: int, rate: float, admission: str) -> Scenario:
    """Return one cell. ``admission`` may be one of ``CACHES``, with its own admission. Clients
    report the end of a session only to policies with a fixed limit, and to `sglang-session`."""
    geometry = ModelGeometry.preset("qwen3-next")
    return Scenario(
        name,
        model=geometry,
        gib=workload.num_rows * geometry.kv_bytes_per_token / GIB,
        policy="lru" if admission == common.LRU_ADAPTIVE else "survival",
        checkpoints="adaptive",
        baseline=admission if admission in REBUILT else (),
        times=LinearSteps(),
        rate=rate,
        seeds=(seed,),
        token_budget=workload.token_budget,
        admission="sessions" if admission in CACHES else admission,
        tells_ends=admission.startswith("live") or admission == "sglang-session",
    )


def serve(job: tuple[str, int, float, str]) -> list[dict[str, Any]]:
    """Return the record of (workload, seed, rate, admission policy)."""
    name, seed, rate, admission = job
    workload = WORKLOADS[name]
    trace = workload.trace(name, seed)
    served = run_closed_loop(trace, scenario(workload, *job))
    found = {figure: getattr(served, figure) for figure in FIGURES}
    if admission == common.LRU_ADAPTIVE:
        found["bound"] = common.bound_in_any_order(trace)
    place = {"trace": name, "seed": seed, "rate": rate, "admission": admission}
    return [common.rounded(place | found)]


def hit_rate(run: Mapping[str, Any]) -> float:
    """Return the token hit rate of a record."""
    return float(run["cached_tokens"] / run["prompt_tokens"])


def mean(runs: common.Records, field: str) -> float:
    """Return the mean of a field."""
    return fmean(run[field] for run in runs)


def _policy_cells(
    runs: Mapping[str, common.Records], caches: Sequence[common.Records]
) -> Iterator[Cell]:
    """Yield hits and gain of ``UNLIMITED``, times of them and of the best limit, those of the first
    and of the best other cache, and the ratios to the best simple rule."""
    oldest, sessions = ([100 * hit_rate(run) for run in runs[policy]] for policy in UNLIMITED)
    yield from (fmean(oldest), fmean(sessions), paired(sessions, oldest))
    limits = [policy for policy in runs if policy.startswith("live")]
    limit = min(limits, key=lambda policy: mean(runs[policy], "ttft_mean_s"))
    times = [
        [mean(of, "ttft_mean_s") for of in served if of] for served in (caches[:1], caches[1:])
    ]
    others = [min(of, default=None) for of in times]
    for field, more in (("ttft_mean_s", others), ("ttft_p99_s", [])):
        yield [*(mean(runs[policy], field) for policy in (*UNLIMITED, limit)), *more]
    for field in ("ttft_mean_s", "makespan_s"):
        best = min(("oldest", *limits), key=lambda policy: mean(runs[policy], field))
        yield ratio(*([run[field] for run in runs[policy]] for policy in ("sessions", best)))


def _references(caches: Sequence[common.Records]) -> Iterator[float | None]:
    """Yield the hits of the first cache, of the best other one, and the bound."""
    lru, *peers = ([hit_rate(run) for run in of] for of in caches)
    best: list[float] = max(filter(None, peers), key=fmean, default=[])
    yield from map(common.percent, (lru, best, [run["bound"] for run in caches[0]]))


def table(records: common.Records) -> Table:
    """Return one row per workload and rate, over the seeds that all policies have.

    The best limit on live sessions is that of the lowest mean TTFT. The last columns are ratios to
    the best simple rule, chosen for each: ``oldest``, or such a limit. The columns of
    ``YARDSTICKS`` are hit rates, and the bound in any order. The best rebuilt system is that of the
    highest mean.
    """
    rows: list[list[Cell]] = []
    for (trace, rate), of in common.grouped(records, "trace", "rate").items():
        runs = common.grouped(sorted(of, key=lambda run: run["seed"]), "admission")
        caches = [runs.pop(name, []) for name in CACHES]
        seeds = set.intersection(*({run["seed"] for run in each} for each in runs.values()))
        if seeds:
            by_policy = {
                policy: [run for run in each if run["seed"] in seeds]
                for policy, each in runs.items()
            }
            rows.append([trace, rate, *_policy_cells(by_policy, caches), *_references(caches)])
    columns = [Column("workload"), Column("sessions/s", form="g"), Column("hits, `oldest`", "%")]
    columns += [Column("`sessions`", "%"), Column("gain", "points")]
    every = "`oldest`, `sessions`, best limit on sessions"
    rivals = f"`{common.LRU_ADAPTIVE}`, best rebuilt system"
    seconds = f"mean TTFT, s: {every}, {rivals}", f"p99 TTFT, s: {every}"
    ratios = "mean TTFT to best of `oldest` and limits", "makespan to best of both"
    columns += [Column(name, form=".2f") for name in (*seconds, *ratios)]
    return Table([*columns, *common.references("{}, hits")], rows)


def main() -> None:
    options = common.command_line(__doc__).parse_args()
    seeds = SPLITS["evaluation"]["seeds"][: options.seeds]
    jobs = [
        (name, seed, rate, admission)
        for seed in seeds
        for name, workload in WORKLOADS.items()
        if workload.is_available
        for rate in SPLITS["rates"][name]
        for admission in (*admissions(name), *CACHES)
    ]
    common.run_study("admission", serve, jobs, table, options.processes)


if __name__ == "__main__":
    main()
