"""Shared parts of the studies: traces with useful sizes, models, result files and figures."""

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
from hybridcache.lab.simulation.grid import collect_seldom
from hybridcache.lab.simulation.result import RunResult
from hybridcache.lab.simulation.simulate import SimulationResult
from hybridcache.lab.simulation.sizes import sizes
from hybridcache.policies.registry import DEFAULT_EVICTION, DEFAULT_PLACEMENT, make_eviction

QWEN3_NEXT = ModelGeometry.preset("qwen3-next")
MARCONI_7B = ModelGeometry.preset("marconi-7b")
"""Hybrid of Marconi's evaluation: 4 attention layers (multi-head), 24 Mamba layers, fp16."""

GB = 1e9 / GIB
"""Decimal gigabyte in GiB."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One trace and the memory sizes at which policies differ."""

    spec: str
    gib: str
    geometry: ModelGeometry = QWEN3_NEXT
    grid: int = 64
    quick: int | None = None
    """Number of requests from the start of the trace, unless ``--full`` is given."""
    is_file: bool = False
    """True if ``spec`` names a published trace, which is not part of the repository. See
    ``published``."""
    has_times: bool = False
    """True if the file has arrival times, so a seed changes nothing."""

    def open(self, name: str, full: bool, seed: int = 0) -> Trace:
        """Return the trace or its start, with ``name`` as its short name. ``seed`` is that of
        random parts."""
        found = published(self.spec) if self.is_file else self.spec
        if found is None:
            folders = ", ".join(map(str, DATA))
            raise FileNotFoundError(f"{name}: {self.spec} not found in {folders}.")
        if seed and not self.has_times:
            found += f"{'&' if '?' in found else '?'}seed={seed}"
        trace = replace(open_trace(found), name=name)
        return trace if full or self.quick is None else trace.head(self.quick)

    def seeds(self, count: int) -> range:
        """Return ``count`` seeds, or one if they would change nothing."""
        return range(1 if self.has_times else count)

    def sizes(self, points: int | None = None) -> tuple[float, ...]:
        """Return sizes in GiB, logarithmically spaced.

        With fewer ``points`` these are a subset, so all studies share the plans for a size.
        """
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


DATA = (ROOT / "data", ROOT.parent / "shared" / "data", ROOT.parent / "shared" / "traces")
"""Folders that are searched for published traces."""


def published(spec: str) -> str | None:
    """Return ``spec`` with the path of its file, or None if the file is missing."""
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
    """Parse the flags of a study.

    All studies have flags for traces, sizes and processes. ``policy`` and ``checkpoints`` add flags
    for more policies, ``few`` for fewer of them, and ``seeds`` for the number of seeds.
    """
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--traces", default=",".join(traces), help="names of WORKLOADS")
    parser.add_argument("--full", action="store_true", help="whole traces, not only their start")
    parser.add_argument("--points", type=int, help="sizes per trace (default: 15)")
    if policy:
        help = "more evictions: names or module:Class, separated by commas"
        parser.add_argument("--policy", default=(), type=_split, help=help)
    if few:
        parser.add_argument("--few", action="store_true", help="fewer policies on all traces")
    if seeds:
        parser.add_argument("--seeds", type=int, default=10, help="seeds of generated traces")
    if checkpoints:
        help = "one more placement: names or module:Class, separated by commas; may be repeated"
        parser.add_argument("--checkpoints", default=[], action="append", help=help)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--resume", type=Path, help="folder for finished runs, to continue a stopped study"
    )
    options = parser.parse_args()
    collect_seldom()
    try:  # Report an unknown policy before minutes are spent on the others.
        for spec in getattr(options, "policy", ()):
            make_eviction(spec)
        for spec in getattr(options, "checkpoints", ()):
            parse_placement(spec)
    except ValueError as error:
        parser.error(str(error))
    return options


STATIC_PLACEMENT = "branch,boundary,backoff,end"
"""Placement by rules without learning, used where studies compare evictions."""


PAIRS = {
    "default pair": (DEFAULT_EVICTION, DEFAULT_PLACEMENT),
    "lru, fixed rules": ("lru", STATIC_PLACEMENT),
}
"""Pairs of eviction and placement that are compared under one condition."""


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


def _split(names: str) -> tuple[str, ...]:
    return tuple(filter(None, names.split(",")))


def sweep(
    name: str,
    options: argparse.Namespace,
    bar: tqdm[Any],
    *,
    plan_grid: int | None = None,
    **settings: Any,
) -> SimulationResult:
    """Simulate a workload over its sizes, and add the best plan with hindsight to each run.

    Args:
        name: workload.
        options: flags of the study.
        bar: progress bar.
        plan_grid: grid of the plan, if it differs from the runs' grid.
        settings: arguments of ``simulate`` that replace the defaults: the workload's model, sizes
            and grid, LRU, and ``STATIC_PLACEMENT``.
    """
    workload = WORKLOADS[name]
    defaults: dict[str, Any] = {"model": workload.geometry, "grid": workload.grid}
    defaults |= {"policy": "lru", "checkpoints": STATIC_PLACEMENT}
    settings = defaults | {"gib": workload.sizes(options.points)} | settings
    bar.set_description(name)

    def show(done: int, total: int) -> None:
        bar.set_postfix_str(f"{done} of {total}")

    result = simulate(
        workload.open(name, options.full),
        processes=options.processes,
        resume_from=options.resume / f"{name}.jsonl" if options.resume else None,
        progress=show,
        **settings,
    )
    bar.set_postfix_str("hindsight")
    return with_plans(result, name, options.full, plan_grid or settings["grid"])


def with_plans(
    result: SimulationResult,
    name: str,
    full: bool,
    grid: int | None = None,
) -> SimulationResult:
    """Return ``result`` with the best plan with hindsight for each size."""
    grid = WORKLOADS[name].grid if grid is None else grid
    hindsights = _hindsights(WORKLOADS[name], name, full)
    plans = {
        gib: hindsights.at(gib, result.geometry, grid)
        for gib in {run.gib for run in result.runs}
        if gib is not None
    }
    runs = (
        replace(run, optimum_tokens=plans[run.gib].cached_tokens) if run.gib in plans else run
        for run in result.runs
    )
    return replace(result, runs=tuple(runs))


def plan_next_to_running(result: SimulationResult, name: str, full: bool) -> list[float]:
    """Return hit rates of the plan that leaves memory for running requests, one per size."""
    hindsights = _hindsights(WORKLOADS[name], name, full)
    sizes = dict.fromkeys(run.gib for run in result.runs if run.gib is not None)
    grid = WORKLOADS[name].grid
    plans = (hindsights.at(gib, result.geometry, grid, counts_running=True) for gib in sizes)
    return [rounded(plan.reached) for plan in plans]


@cache
def _hindsights(workload: Workload, name: str, full: bool) -> Hindsights:
    return Hindsights(workload.open(name, full).kept())


def workloads(options: argparse.Namespace) -> tqdm[Any]:
    """Return the names of the requested traces that are available, with a progress bar."""
    names = [name for name in options.traces.split(",") if WORKLOADS[name].is_available]
    return tqdm(names, disable=None)


def title(result: SimulationResult, options: argparse.Namespace) -> str:
    """Return the title of a panel: the trace, a note if only its start is used, and the model."""
    workload = WORKLOADS[result.trace]
    first = "" if options.full or workload.quick is None else "first "
    num_requests = f"{first}{result.runs[0].requests:,} requests"
    return f"{result.trace}, {num_requests} ({result.geometry.name})"


RECORDED = (
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
    """Return the runs of each policy by name.

    The name is ``eviction`` if the placement is ``STATIC_PLACEMENT``, else ``eviction @
    placement``.
    """
    found: dict[str, list[RunResult]] = {}
    for label, runs in result.by_label().items():
        config = runs[0].config
        is_static = config.checkpoints == STATIC_PLACEMENT
        name = str(config.policy) if is_static else f"{config.policy} @ {config.checkpoints}"
        found[name if config.baseline is None else label] = list(runs)
    return found


def slim(trace: str, run: RunResult, **more: Any) -> dict[str, Any]:
    """Return one run as stored in a results file: rates with six digits, no bins."""
    record = run.as_record()
    figures = {name: rounded(record[name]) for name in RECORDED if record[name] is not None}
    config = {name: value for name, value in asdict(run.config).items() if value is not None}
    return config | {"trace": trace} | more | figures


def rounded(value: Any) -> Any:
    """Return ``value`` with all floats rounded to six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value


def keep(name: str, records: Iterable[dict[str, Any]]) -> Path:
    """Write a study's records. Returns the path."""
    path = provenance.RESULTS / f"{name}.jsonl"
    write_json_lines(path, records)
    return path


def figure_path(name: str) -> Path:
    return provenance.FIGURES / f"{name}.png"
