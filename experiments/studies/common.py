"""Common parts of the studies: traces with useful sizes, models, result files and figures."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments import provenance
from experiments.provenance import ROOT, write_json_lines
from experiments.studies.hindsight import Hindsights
from hybridcache import ModelGeometry, Trace, open_trace, parse_placement, simulate
from hybridcache.geometry.units import GIB
from hybridcache.lab.simulation.result import RunResult
from hybridcache.lab.simulation.simulate import SimulationResult
from hybridcache.lab.simulation.sizes import sizes
from hybridcache.lab.simulation.sweep import collect_seldom
from hybridcache.policies.registry import DEFAULT_EVICTION, DEFAULT_PLACEMENT, make_eviction

QWEN3_NEXT = ModelGeometry.preset("qwen3-next")
MARCONI_7B = ModelGeometry.preset("marconi-7b")
"""The hybrid of Marconi's evaluation: 4 attention layers (multi-head), 24 Mamba layers, fp16."""

GB = 1e9 / GIB
"""A decimal gigabyte in GiB."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One trace and the sizes at which something happens to it."""

    spec: str
    gib: str
    geometry: ModelGeometry = QWEN3_NEXT
    grid: int = 64
    quick: int | None = None
    """First so many requests, unless everything is asked for."""
    is_file: bool = False
    """``spec`` names a published trace, which is not part of the repository; see ``published``."""
    has_times: bool = False
    """The file says when each request came, so that a seed changes nothing."""

    def open(self, name: str, full: bool, seed: int = 0) -> Trace:
        """The trace, or its beginning, under a short name. ``seed``: of what is drawn in it."""
        found = published(self.spec) if self.is_file else self.spec
        if found is None:
            raise FileNotFoundError(f"{name}: {self.spec} is in none of the folders {DATA}")
        if seed and not self.has_times:
            found += f"{'&' if '?' in found else '?'}seed={seed}"
        trace = replace(open_trace(found), name=name)
        return trace if full or self.quick is None else trace.head(self.quick)

    def sizes(self, points: int | None = None) -> tuple[float, ...]:
        """GiB, logarithmically spaced; of fewer points a subset, so that all studies share what was
        worked out for a size."""
        every = sizes(self.gib)
        if points is None or points >= len(every):
            return every
        return tuple(every[round(place)] for place in np.linspace(0, len(every) - 1, points))

    @property
    def middle(self) -> float:
        """The size in the middle of the logarithmic axis, where memory is short."""
        every = self.sizes()
        return every[len(every) // 2]

    @property
    def is_here(self) -> bool:
        return not self.is_file or published(self.spec) is not None


DATA = (ROOT / "data", ROOT.parent / "shared" / "data")
"""Folders in which published traces are looked up."""


def published(spec: str) -> str | None:
    """Return ``spec`` with the path of its file. None if the file is missing."""
    name, mark, options = spec.partition("?")
    path = next((path for folder in DATA if (path := folder / name).is_file()), None)
    return None if path is None else f"{path}{mark}{options}"


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
        "traces/mooncake_conversation_trace.jsonl.gz",
        "20:2560:15",
        quick=3000,
        is_file=True,
        has_times=True,
    ),
    "coding-agent": Workload(
        "traces/weka_claude_code_train.rle.jsonl.gz?starts=fixed:0.002",
        "20:1280:15",
        quick=2000,
        is_file=True,
    ),
    "tau-bench": Workload(
        "agent/taubench_gpt-4o-airline.json.gz?tokenizer=qwen3.5",
        "0.5:64:15",
        quick=1000,
        is_file=True,
    ),
    "sharegpt": Workload(
        "traces/sharegpt_qwen35_turns.jsonl.gz?cap=8192&starts=poisson:0.2",
        "1:128:15",
        quick=1000,
        is_file=True,
    ),
}


def arguments(
    description: str | None,
    *traces: str,
    policy: bool = False,
    checkpoints: bool = False,
    few: bool = False,
    seeds: bool = False,
) -> argparse.Namespace:
    """The flags that every study has: which traces, all of them or their beginnings, how many
    processes; and ``--policy`` or ``--checkpoints`` for more competitors, where it compares those,
    or ``--few`` for less of them."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--traces", default=",".join(traces), help="words of WORKLOADS")
    parser.add_argument("--full", action="store_true", help="whole traces, not their beginnings")
    parser.add_argument("--points", type=int, help="sizes per trace instead of 15")
    if policy:
        help = "more evictions: words or module:Class, commas between"
        parser.add_argument("--policy", default=(), type=_split, help=help)
    if few:
        parser.add_argument("--few", action="store_true", help="some policies on all traces")
    if seeds:
        parser.add_argument("--seeds", type=int, default=10, help="seeds of generated traces")
    if checkpoints:
        help = "one more placement: words or module:Class, commas between; may be repeated"
        parser.add_argument("--checkpoints", default=[], action="append", help=help)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--resume", type=Path, help="folder that keeps runs until the study is done"
    )
    options = parser.parse_args()
    collect_seldom()
    try:  # an unknown word is reported before minutes are spent on the others
        for word in getattr(options, "policy", ()):
            make_eviction(word)
        for word in getattr(options, "checkpoints", ()):
            parse_placement(word)
    except ValueError as error:
        parser.error(str(error))
    return options


STATIC_PLACEMENT = "branch,boundary,backoff,end"
"""Checkpoints by rules that learn nothing: held fixed where studies compare evictions."""


PAIRS = {
    "default pair": (DEFAULT_EVICTION, DEFAULT_PLACEMENT),
    "lru, fixed rules": ("lru", STATIC_PLACEMENT),
}
"""Pairs of eviction and placement that studies of one condition compare."""


def hit_rates(
    trace: Trace, gib: Sequence[float], pair: str, model: str, **settings: Any
) -> list[float]:
    """Return the token hit rate at each size, for one of ``PAIRS``."""
    policy, placement = PAIRS[pair]
    result = simulate(
        trace,
        model=model,
        gib=gib,
        policy=policy,
        checkpoints=[placement],
        bound=False,
        progress=False,
        **settings,
    )
    return [rounded(run.token_hit_rate) for run in result.runs]


def _split(words: str) -> tuple[str, ...]:
    return tuple(filter(None, words.split(",")))


def sweep(
    word: str,
    options: argparse.Namespace,
    bar: tqdm[Any],
    *,
    plan_grid: int | None = None,
    proven: bool = False,
    **settings: Any,
) -> SimulationResult:
    """``simulate`` over the sizes of a workload, each run next to the best plan with hindsight.
    ``settings`` go to it and win over the workload's, LRU and ``STATIC_PLACEMENT``. ``plan_grid``:
    another grid for the plan than for the runs. ``proven``: with the bound on all plans, on short
    traces."""
    workload = WORKLOADS[word]
    defaults: dict[str, Any] = {"model": workload.geometry, "grid": workload.grid}
    defaults |= {"policy": "lru", "checkpoints": STATIC_PLACEMENT}
    settings = defaults | {"gib": workload.sizes(options.points)} | settings
    bar.set_description(word)

    def show(done: int, total: int) -> None:
        bar.set_postfix_str(f"{done} of {total}")

    result = simulate(
        workload.open(word, options.full),
        processes=options.processes,
        resume_from=options.resume / f"{word}.jsonl" if options.resume else None,
        progress=show,
        **settings,
    )
    bar.set_postfix_str("hindsight")
    return measured(result, word, options.full, plan_grid or settings["grid"], proven)


def measured(
    result: SimulationResult,
    word: str,
    full: bool,
    grid: int | None = None,
    proven: bool = False,
) -> SimulationResult:
    """The runs of a workload beside the best plan of their size with hindsight, and beside the
    infinite cache."""
    grid = WORKLOADS[word].grid if grid is None else grid
    hindsights = _hindsights(WORKLOADS[word], word, full)
    plans = {
        gib: hindsights.at(gib, result.geometry, grid, proven=proven)
        for gib in {run.gib for run in result.runs}
        if gib is not None
    }
    runs = (
        replace(run, optimum_tokens=plans[run.gib].cached_tokens) if run.gib in plans else run
        for run in result.runs
    )
    bounds = {gib: plan.bound for gib, plan in plans.items() if plan.bound is not None}
    return replace(result, runs=tuple(runs), plan_bounds=bounds)


def plan_beside_running(result: SimulationResult, word: str, full: bool) -> list[float]:
    """Return hit rates of the plan that leaves room for running requests, one per size."""
    hindsights = _hindsights(WORKLOADS[word], word, full)
    sizes = dict.fromkeys(run.gib for run in result.runs if run.gib is not None)
    grid = WORKLOADS[word].grid
    plans = (hindsights.at(gib, result.geometry, grid, counts_running=True) for gib in sizes)
    return [rounded(plan.reached) for plan in plans]


@cache
def _hindsights(workload: Workload, word: str, full: bool) -> Hindsights:
    return Hindsights(workload.open(word, full).kept())


def workloads(options: argparse.Namespace) -> tqdm[Any]:
    """The traces asked for that are here, with a progress bar."""
    words = [word for word in options.traces.split(",") if WORKLOADS[word].is_here]
    return tqdm(words, disable=None)


def title(result: SimulationResult, options: argparse.Namespace) -> str:
    """Return the title of a panel: the trace, a note if it is only the beginning, and the model."""
    workload = WORKLOADS[result.trace]
    first = "" if options.full or workload.quick is None else "first "
    num_requests = f"{first}{result.runs[0].requests:,} requests"
    return f"{result.trace}, {num_requests} ({result.geometry.name})"


KEPT = (
    "requests",
    "prompt_tokens",
    "token_hit_rate",
    "request_hit_rate",
    "flops_saved_rate",
    "share_of_bound",
    "share_of_optimum",
    "losses",
    "ttft_s",
    "ttft_mean_s",
    "missed_tokens",
    "checkpoints_made",
    "checkpoint_copies",
    "copied_bytes",
    "bypassed",
)


def by_competitor(result: SimulationResult) -> dict[str, list[RunResult]]:
    """Return the runs of each competitor by name: that of the eviction alone where the placement is
    ``STATIC_PLACEMENT``, else ``eviction @ placement``."""
    found: dict[str, list[RunResult]] = {}
    for label, runs in result.by_label().items():
        config = runs[0].config
        is_static = config.checkpoints == STATIC_PLACEMENT
        name = str(config.policy) if is_static else f"{config.policy} @ {config.checkpoints}"
        found[name if config.baseline is None else label] = list(runs)
    return found


def slim(trace: str, run: RunResult, **more: Any) -> dict[str, Any]:
    """One run as a results file keeps it: rates in six digits, no bins."""
    record = run.as_record()
    kept = {name: rounded(record[name]) for name in KEPT if record[name] is not None}
    config = {name: value for name, value in asdict(run.config).items() if value is not None}
    return config | {"trace": trace} | more | kept


def rounded(value: Any) -> Any:
    """Every float in it to six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value


def keep(name: str, records: Iterable[dict[str, Any]]) -> Path:
    """Write a study's records; returns where."""
    path = provenance.RESULTS / f"{name}.jsonl"
    write_json_lines(path, records)
    return path


def figure_path(name: str) -> Path:
    return provenance.FIGURES / f"{name}.png"
