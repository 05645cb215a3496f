"""Sweep admission policies over the rate of sessions, in closed loop.

    python -m experiments.studies.admission [--seeds 11 12] [--workers 2] [--only agents chats]

Above some rate the hit rate collapses. The study compares that rate between policies on five agent
and four chat workloads at five rates each, with the default pair of policies.

Three workloads replay sessions of published traces. Their files are looked up in ``data/`` and
``../shared/data/``, and a missing one is skipped. Seeds, rates and memory are declared in
``splits.toml``.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

import numpy as np

from experiments.provenance import ROOT
from experiments.studies.common import keep, measured, published
from hybridcache import open_trace
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.units import GIB
from hybridcache.lab.intervals import paired, ratio
from hybridcache.lab.report import text_table
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.simulation.closed_loop import run_closed_loop
from hybridcache.lab.simulation.result import ClosedLoopRun
from hybridcache.lab.simulation.step_times import LinearSteps
from hybridcache.lab.trace import Trace, TraceRequest

SPLITS_FILE = ROOT / "experiments" / "splits.toml"
SPLITS = tomllib.loads(SPLITS_FILE.read_text(encoding="utf-8"))["admission"]
VOCABULARY = 50_000
UNLIMITED = ("oldest", "cached-first", "sessions")


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
class Workload:
    """Sessions of one or several kinds, and the engine that serves them."""

    num_sessions: int
    kinds: tuple[Kind, ...]
    """Kinds of equal parts of the sessions, in order of time. Empty for a published trace."""
    num_rows: int
    """KV rows that the memory holds."""
    token_budget: int
    fixed: tuple[int, ...]
    """Fixed numbers of live sessions for comparison."""
    file: str = ""
    """Published trace, with options."""

    @property
    def is_available(self) -> bool:
        return not self.file or published(self.file) is not None

    def trace(self, name: str, seed: int) -> Trace:
        """Return the sessions of ``seed``, or those of the file."""
        if self.file:
            found = published(self.file)
            assert found is not None, f"{self.file} is missing"
            read = open_trace(found)
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
WORKLOADS = {
    "agents": Workload(60, (AGENT,), 260_000, 2048, (10, 14, 18, 24)),
    "changing agents": Workload(
        60,
        (
            AGENT,
            Kind((15_000, 30_000), (5, 15), (200, 1500), (30, 120), (4.0, 0.9)),
            Kind((500, 1500), (3, 10), (50, 300), (30, 120), (15.0, 1.0)),
        ),
        260_000,
        2048,
        (6, 10, 14, 20),
    ),
    "coding agents": Workload(
        40,
        (Kind((500, 3000), (10, 40), (100, 1500), (30, 250), (3.0, 1.2), 8000),),
        300_000,
        2048,
        (8, 12, 16, 24),
    ),
    "chats": Workload(
        120,
        (Kind((0, 100), (3, 16), (20, 300), (100, 500), (25.0, 1.0), 1500, 4),),
        160_000,
        2048,
        (24, 32, 48, 64),
    ),
    "short chats": Workload(
        150,
        (Kind((0, 50), (1, 10), (20, 200), (100, 600), (30.0, 1.0), 300),),
        160_000,
        2048,
        (24, 32, 48, 64),
    ),
    "long chats": Workload(
        100,
        (Kind((500, 4000), (3, 16), (50, 800), (100, 500), (25.0, 1.0), 1500, 4),),
        200_000,
        2048,
        (16, 24, 34, 48),
    ),
    # A byte counts as a token here, so the load is high enough to matter. With Qwen's tokens,
    # which are fewer, no request is held back at rates of 0.1, 0.2 and 0.5 (seed 11).
    "airline agents (tau-bench)": Workload(
        78,
        (),
        160_000,
        2048,
        (8, 12, 18, 26),
        "agent/taubench_gpt-4o-airline.json.gz?tokenizer=bytes&head=800",
    ),
    "Claude Code": Workload(
        34,
        (),
        800_000,
        8192,
        (6, 9, 13, 18),
        "traces/weka_claude_code_train.rle.jsonl.gz?head=700",
    ),
    "ShareGPT chats": Workload(
        517,
        (),
        160_000,
        2048,
        (16, 24, 36, 54),
        "traces/sharegpt_qwen35_turns.jsonl.gz?cap=8192&head=1200",
    ),
}


def admissions(name: str) -> tuple[str, ...]:
    return *UNLIMITED, *(f"live:{limit}" for limit in WORKLOADS[name].fixed)


def serve(job: tuple[str, int, float, str]) -> ClosedLoopRun:
    """Simulate one cell. Clients report the end of a session only to policies with a fixed
    limit."""
    name, seed, rate, admission = job
    workload, geometry = WORKLOADS[name], ModelGeometry.preset("qwen3-next")
    cell = Scenario(
        name,
        model=geometry,
        gib=workload.num_rows * geometry.kv_bytes_per_token / GIB,
        policy="survival",
        checkpoints="adaptive",
        times=LinearSteps(),
        rate=rate,
        seeds=(seed,),
        token_budget=workload.token_budget,
        admission=admission,
        tells_ends=admission.startswith("live"),
    )
    return run_closed_loop(workload.trace(name, seed), cell)


Runs = dict[str, list[ClosedLoopRun]]
"""Runs by admission policy, of the same seeds in the same order."""


def cells(runs: Sequence[ClosedLoopRun]) -> Iterator[tuple[str, float, Runs]]:
    """Yield (workload, rate, runs) with the seeds that all policies have, if there are any."""
    found: dict[tuple[str, float], dict[str, dict[int, ClosedLoopRun]]] = {}
    for run in runs:
        by_policy = found.setdefault((run.trace, run.rate), {})
        by_policy.setdefault(run.admission, {})[run.seed] = run
    for (name, rate), by_policy in found.items():
        seeds = sorted(set.intersection(*map(set, by_policy.values())))
        if seeds:
            yield name, rate, {p: [of[seed] for seed in seeds] for p, of in by_policy.items()}


def best_simple(by_policy: Runs, field: str) -> list[ClosedLoopRun]:
    """Return the runs of the simple rule with the lowest mean of ``field``: ``oldest``, or a fixed
    number of sessions."""
    simple = [by_policy[name] for name in by_policy if name == "oldest" or name not in UNLIMITED]
    return min(simple, key=lambda runs: mean(runs, field))


def mean(runs: Sequence[ClosedLoopRun], field: str) -> float:
    return sum(getattr(run, field) for run in runs) / len(runs)


def table(runs: Sequence[ClosedLoopRun]) -> tuple[list[str], list[list[str]]]:
    """Return a header and one row per workload and rate.

    The last columns are ratios to the best fixed number of live sessions, chosen for each."""
    rows = []
    for trace, rate, by_policy in cells(runs):
        pair = by_policy["oldest"], by_policy["sessions"]
        oldest, sessions = ([100 * run.token_hit_rate for run in runs] for runs in pair)
        row = [trace, f"{rate:g}", f"{fmean(oldest):.1f}", f"{fmean(sessions):.1f}"]
        row.append(str(paired(sessions, oldest)))
        for field in ("ttft_mean_s", "ttft_p99_s"):
            row.append(", ".join(f"{mean(runs, field):.1f}" for runs in pair))
        for field in ("ttft_mean_s", "makespan_s"):
            best = [getattr(run, field) for run in best_simple(by_policy, field)]
            row.append(f"{ratio([getattr(run, field) for run in by_policy['sessions']], best):.2f}")
        rows.append(row)
    header = ["workload", "sessions/s", "hits, `oldest`, %", "`sessions`, %", "gain, points"]
    header += [f"{name} TTFT, s: `oldest`, `sessions`" for name in ("mean", "p99")]
    header += ["mean TTFT to best limit", "makespan to best limit"]
    return header, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SPLITS["evaluation"]["seeds"])
    available = [name for name, workload in WORKLOADS.items() if workload.is_available]
    parser.add_argument("--only", nargs="+", default=available, choices=available)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    jobs = [
        (name, seed, rate, admission)
        for seed in options.seeds
        for name in options.only
        for rate in SPLITS["rates"][name]
        for admission in admissions(name)
    ]
    runs = measured(serve, jobs, options.workers)
    keep("admission", map(asdict, runs))
    print(text_table(*table(runs)))


if __name__ == "__main__":
    main()
