"""Shared parts of the studies: traces with useful sizes, models, result files and figures."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments import provenance
from experiments.provenance import ROOT, write_json_lines
from experiments.tables import Column, Table
from hybridcache import ModelGeometry, Trace, closed_loop, open_trace, simulate
from hybridcache.lab.results.result import ClosedLoopRun, RunResult
from hybridcache.lab.rivals.optimum import MemoryBudget, Relaxation, build_trie
from hybridcache.lab.runs.closed_loop import sessions_of
from hybridcache.lab.runs.grid import prepare_worker
from hybridcache.lab.traces import SHIPPED
from hybridcache.lab.traces.prefix_tree import InfiniteCache
from hybridcache.lab.traces.sizes import budget_bytes, sizes
from hybridcache.policies.registry import DEFAULT_EVICTION, DEFAULT_PLACEMENT

QWEN3_NEXT = ModelGeometry.preset("qwen3-next")
MARCONI_7B = ModelGeometry.preset("marconi-7b")
"""Hybrid of Marconi's evaluation: 4 attention layers (multi-head), 24 Mamba layers, fp16."""

STATIC_PLACEMENT = "branch,boundary,backoff,end"
"""Placement by rules without learning, used where studies compare evictions."""
DEFAULT = f"{DEFAULT_EVICTION}@{DEFAULT_PLACEMENT}"
LRU = f"lru@{STATIC_PLACEMENT}"
PAIRS = {"default pair": DEFAULT, "lru, adaptive": "lru@adaptive", "lru, fixed rules": LRU}
"""Pairs ``eviction@placement`` that are compared under one condition."""
LRU_ADAPTIVE = "lru@adaptive"
REBUILT = ("vllm", "sglang", "marconi-static")
"""Rebuilt systems that are compared. Marconi has one fixed weight, because tuning it replays a
trace 21 times. All have their whole cache within their size, so the upper bound is also theirs."""
BEST_REBUILT, BOUND = "best rebuilt system", "upper bound"
YARDSTICKS = (LRU_ADAPTIVE, BEST_REBUILT, BOUND)

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Workload:
    """One trace and the memory sizes at which policies differ."""

    spec: str
    gib: str
    geometry: ModelGeometry = QWEN3_NEXT
    grid: int = 64
    quick: int | None = None
    """Number of requests from the start of the trace, or None for all."""
    has_times: bool = False
    """True if the file has arrival times, so a seed changes nothing."""

    @property
    def is_file(self) -> bool:
        """True if ``spec`` names a published trace, which is not part of the repository. See
        ``published``."""
        return is_published(self.spec)

    def open(self, name: str, seed: int = 0) -> Trace:
        """Return the trace or its start, with ``name`` as its short name. ``seed`` is that of
        random parts."""
        trace = replace(opened(self.spec, 0 if self.has_times else seed), name=name)
        return trace if self.quick is None else trace.head(self.quick)

    def seeds(self, count: int) -> range:
        """Return ``count`` seeds, or one if they would change nothing."""
        return range(1 if self.has_times else count)

    def sizes(self, points: int | None = None) -> tuple[float, ...]:
        """Return sizes in GiB, logarithmically spaced. Fewer ``points`` are a subset."""
        all_sizes = sizes(self.gib)
        if points is None or points >= len(all_sizes):
            return all_sizes
        return tuple(all_sizes[round(i)] for i in np.linspace(0, len(all_sizes) - 1, points))

    @property
    def middle(self) -> float:
        """Size in the middle of the logarithmic axis, where memory is short."""
        all_sizes = self.sizes()
        return all_sizes[len(all_sizes) // 2]

    @property
    def is_available(self) -> bool:
        return not self.is_file or published(self.spec) is not None


MORE_DATA = "HYBRIDCACHE_DATA"
DATA = (ROOT / "data", *map(Path, filter(None, os.environ.get(MORE_DATA, "").split(os.pathsep))))
"""Folders that are searched for published traces, before those that the package ships: ``data`` of
the checkout, and those that the environment variable ``HYBRIDCACHE_DATA`` names."""


def is_published(spec: str) -> bool:
    """Return True if ``spec`` names a file, False for a generator."""
    return "." in spec.partition("?")[0]


def published(spec: str) -> str | None:
    """Return ``spec`` with the path of its file, or None, which is said on standard error, if the
    file is missing."""
    found = in_data(spec)
    if found is None:
        name = spec.partition("?")[0]
        _say(f"left out: {name}: no such file in {' or '.join(map(str, DATA))}")
    return found


def opened(spec: str, seed: int = 0) -> Trace:
    """Return a generated or published trace with the ``seed`` of its random parts. Raises
    FileNotFoundError for a published trace that is missing."""
    found = published(spec) if is_published(spec) else spec
    if found is None:
        raise FileNotFoundError(f"{spec} not found in {', '.join(map(str, DATA))}.")
    return open_trace(seeded(found, seed) if seed else found)


def in_data(spec: str) -> str | None:
    """Return ``spec`` with the path of its file, or None if the file is missing."""
    name, mark, options = spec.partition("?")
    shipped = SHIPPED.get(name.partition(".")[0].replace("_", "-"))
    path = next((path for folder in DATA if (path := folder / name).is_file()), shipped)
    return None if path is None else f"{path}{mark}{options}"


@cache
def _say(sentence: str) -> None:
    """Print a sentence once on standard error."""
    print(sentence, file=sys.stderr)


def seeded(spec: str, seed: int) -> str:
    """Return the trace ``spec`` with a seed."""
    return f"{spec}{'&' if '?' in spec else '?'}seed={seed}"


WORKLOADS: dict[str, Workload] = {
    "chat": Workload("chat", "1:32:15"),
    "few-shot": Workload("few-shot", "0.5:16:15"),
    "agent": Workload("agent", "0.5:32:15"),
    "branch": Workload("branch", "0.5:16:15"),
    "resend": Workload("resend", "0.5:16:15"),
    "short": Workload("short", "0.5:16:15"),
    "conversations": Workload("conversations?live=128", "4:200:15", quick=2000),
    "sharegpt-like": Workload("sharegpt-like", "1:40:15", MARCONI_7B, grid=1),
    "mooncake": Workload(
        "traces/mooncake_conversation_trace.jsonl.gz", "20:2560:15", quick=3000, has_times=True
    ),
    "coding-agent": Workload(
        "traces/weka_claude_code_train.rle.jsonl.gz?starts=fixed:0.002", "20:1280:15", quick=2000
    ),
    "tau-bench": Workload(
        "agent/taubench_gpt-4o-airline.json.gz?tokenizer=qwen3.5", "0.5:64:15", quick=1000
    ),
    "sharegpt": Workload(
        "traces/sharegpt_qwen35_turns.jsonl.gz?cap=8192&starts=poisson:0.2", "1:128:15", quick=1000
    ),
}


SEEDS = 5
"""Number of seeds of a published figure, if nothing else is said."""


def command_line(
    description: str | None, *traces: str, seeds: int = SEEDS
) -> argparse.ArgumentParser:
    """Return the flags of a study: number of seeds and of processes, and names of traces if it has
    ``traces``."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--seeds", type=positive, default=seeds, help="number of seeds")
    parser.add_argument("--processes", type=positive, default=2)
    if traces:
        parser.add_argument("--traces", nargs="+", choices=WORKLOADS, default=traces)
    return parser


def positive(text: str) -> int:
    """Return the value of a flag that is a number from 1 on."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"it must be at least 1 (got {number})")
    return number


def cells_of(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Return (trace, seed) for the requested traces that are available."""
    names = [name for name in options.traces if WORKLOADS[name].is_available]
    return [(name, seed) for name in names for seed in WORKLOADS[name].seeds(options.seeds)]


def replay(
    trace: Trace, gib: Sequence[float], pair: str = DEFAULT, **settings: Any
) -> tuple[RunResult, ...]:
    """Replay ``trace`` with one pair of policies, or a rebuilt system. Returns a run per size."""
    settings |= caches(pair) | {"bound": False, "progress": False}
    return tuple(simulate(trace, gib=gib, **settings).runs)


def serve(
    trace: Trace, gib: Sequence[float], pair: str, rate: float, seed: int, **settings: Any
) -> tuple[ClosedLoopRun, ...]:
    """Serve ``rate`` sessions a second in closed loop, else as ``replay``."""
    settings = {"admission": "sessions", "progress": False} | caches(pair) | settings
    return tuple(closed_loop(trace, gib=gib, rate=rate, seeds=[seed], **settings).runs)


def hit_rates(
    trace: Trace,
    gib: Sequence[float],
    name: str,
    rate: float | None = None,
    seed: int = 0,
    **settings: Any,
) -> list[float]:
    """Return the token hit rates of a pair, a rebuilt system or the bound, one per size: in turn,
    or in closed loop at a ``rate`` of sessions, where only the bound in any order holds."""
    if name == BOUND:
        in_turn = rate is None
        return bounds(trace, settings["model"], gib) if in_turn else [bound_in_any_order(trace)]
    runs: Sequence[RunResult | ClosedLoopRun]
    if rate is None:
        runs = replay(trace, gib, name, **settings)
    else:
        runs = serve(trace, gib, name, rate, seed, **settings)
    return [run.token_hit_rate for run in runs]


def caches(pair: str) -> dict[str, Any]:
    """Return the settings of a simulation for ``eviction@placement`` or a rebuilt system."""
    policy, is_pair, placement = pair.partition("@")
    if not is_pair:
        return {"policy": (), "baseline": [pair]}
    return {"policy": policy, "checkpoints": [placement]}


def bounds(trace: Trace, model: ModelGeometry | str, gib: Sequence[float]) -> list[float]:
    """Return the token hit rates that no cache of each size exceeds in a replay in turn."""
    geometry = ModelGeometry.preset(model) if isinstance(model, str) else model
    relaxation = Relaxation(build_trie(trace))
    row_bytes = geometry.kv_bytes_per_token * trace.unit
    budgets = (MemoryBudget(budget_bytes(size), row_bytes, geometry.state_bytes) for size in gib)
    prompt_tokens = sum(request.num_tokens(trace.unit) for request in trace)
    return [relaxation.bound(budget) * trace.unit / prompt_tokens for budget in budgets]


def bound_in_any_order(trace: Trace) -> float:
    """Return the token hit rate that no cache exceeds in a closed loop, whatever its memory is.

    The order of requests depends on the policy there, so the memory between two requests bounds
    nothing. Each distinct token of all prompts is computed at least once, as prompt or as answer,
    and at least one token of each prompt.
    """
    cache, turns = InfiniteCache(), [*chain.from_iterable(sessions_of(trace))]
    for turn in turns:
        cache.visit(turn.text, turn.namespace)
    prompt_tokens = sum(turn.prompt_len for turn in turns)
    answer_tokens = sum(len(turn.text) for turn in turns) - prompt_tokens
    return 1 - max(cache.num_ids - answer_tokens, len(turns)) / prompt_tokens


def percent(rates: Sequence[float]) -> float | None:
    """Return the mean of rates in percent, or None if there is none."""
    return 100 * sum(rates) / len(rates) if rates else None


def references(title: str = "{}") -> list[Column]:
    """Return the columns of ``YARDSTICKS``, with ``title`` around their names."""
    return [Column(title.format(name), "%", reference=name) for name in YARDSTICKS]


def measured(work: Callable[[Any], Any], jobs: Sequence[Any], processes: int) -> Iterator[Any]:
    """Yield ``work(job)`` for each job, computed in new processes if there are several."""
    if processes == 1:
        yield from map(work, tqdm(jobs, disable=None))
        return
    spawn = get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, initializer=prepare_worker) as pool:
        yield from tqdm(pool.map(work, jobs), total=len(jobs), disable=None)


def run_study(
    name: str,
    work: Callable[[Any], Records],
    jobs: Sequence[Any],
    table: Callable[[Any], Table],
    processes: int,
) -> None:
    """Measure all jobs, write their records into the result file ``name``, and print the table."""
    records = [record for found in measured(work, jobs, processes) for record in found]
    keep(name, records, table=table)


def grouped(records: Records, *names: str) -> dict[Any, list[Mapping[str, Any]]]:
    """Return the records by the value of a field, or by those of several fields."""
    found: dict[Any, list[Mapping[str, Any]]] = {}
    for record in records:
        key = tuple(record[name] for name in names)
        found.setdefault(key if len(names) > 1 else key[0], []).append(record)
    return found


def rates(
    records: Records, field: str = "token_hit_rate", scale: float = 100, **where: Any
) -> list[float]:
    """Return the mean of a figure for each seed, of the records with the fields ``where``."""
    found = [one for one in records if where.items() <= one.items()]
    return [scale * fmean(one[field] for one in of) for of in grouped(found, "seed").values()]


def rounded(value: Any) -> Any:
    """Return ``value`` with all floats rounded to six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value


def keep(
    name: str,
    records: Records,
    settings: Mapping[str, Any] | None = None,
    table: Callable[[Records], Table] | None = None,
) -> Path:
    """Write records into the result file ``name``, and print its path and their ``table``. Ends the
    process without any record: earlier results are better."""
    if not records:
        raise SystemExit(f"{name} is not written: no trace is in {' or '.join(map(str, DATA))}.")
    path = provenance.WRITTEN / f"{name}.jsonl"
    write_json_lines(path, records, settings)
    print(path)
    if table:
        print(table(records))
    return path


def plain_table(records: Records) -> Table:
    """Return the numbers and texts of records, a row each."""
    fields = records[0].items() if records else ()
    columns = [Column(name, form=".4g") for name, of in fields if isinstance(of, str | float | int)]
    cells = ([record.get(one.name, "") for one in columns] for record in records)
    return Table(
        columns, [[of if isinstance(of, float) else str(of) for of in row] for row in cells]
    )
