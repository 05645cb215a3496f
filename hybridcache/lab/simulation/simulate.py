"""Replay a trace through caches: who wins, at which size, and why each token was lost.

>>> from hybridcache.lab.simulation.simulate import simulate
>>> result = simulate("short", gib="1:8:3", policy=("survival", "lru"))
>>> [run.label for run in result.runs]
['survival', 'survival', 'survival', 'lru', 'lru', 'lru']
>>> all(run.token_hit_rate <= result.bound_rate for run in result.runs)
True
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from hybridcache.config import GRID
from hybridcache.geometry.exchange import DISK_BYTES_PER_S, PCIE_BYTES_PER_S
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.times import MeasuredTimes, PrefillTimes, Roofline, describe_times
from hybridcache.geometry.units import GIB
from hybridcache.lab.baselines import HOST_TIERS
from hybridcache.lab.defaults import GIB_SPEC, LIMIT_S, MODEL
from hybridcache.lab.infinite import InfiniteCache
from hybridcache.lab.simulation.result import RunResult, SweepRuns
from hybridcache.lab.simulation.serving import Serving
from hybridcache.lab.simulation.sizes import budget_bytes, sizes, tier_bytes
from hybridcache.lab.simulation.sweep import Job, identity_of, run_sweep
from hybridcache.lab.simulation.target import RunConfig, check_words
from hybridcache.lab.trace import Trace
from hybridcache.lab.traces import open_trace
from hybridcache.policies.registry import (
    DEFAULT_EVICTION,
    DEFAULT_PLACEMENT,
    EvictionSpec,
    PlacementSpec,
)
from hybridcache.policies.user import OwnPolicy, own_policy, spec_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hybridcache.lab.optimum import Optimum


Words = str | Sequence[str]
Policy = EvictionSpec | PlacementSpec
Policies = Policy | Sequence[Policy]
OptimumMethod = Literal["greedy", "lp", "milp"]


@dataclass(frozen=True, slots=True, repr=False)
class SimulationResult(SweepRuns):
    """All runs of one sweep over one trace, with their tables and figures."""

    def __repr__(self) -> str:
        """Return one line: trace, number of runs, and the best of them."""
        from hybridcache.lab.report import sweep_line

        return f"{type(self).__name__}({sweep_line(self)})"

    def _repr_html_(self) -> str:
        """Return the table of token hit rates for a notebook, with a curve per competitor."""
        from hybridcache.lab.report import sweep_html

        return sweep_html(self)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return a flat dictionary per run: its settings, rates, times and lost tokens by cause.

        Loss causes are ``lost_`` and the cause; None where a rebuilt peer does not tell. O(runs).
        """
        from hybridcache.lab.report import flat_record

        return [flat_record(run) for run in self.runs]

    def to_pandas(self) -> Any:
        """Return ``to_dicts`` as a pandas DataFrame. ModuleNotFoundError if pandas is missing."""
        return _optional("pandas", "to_pandas").DataFrame(self.to_dicts())

    def to_polars(self) -> Any:
        """Return ``to_dicts`` as a polars DataFrame. ModuleNotFoundError if polars is missing."""
        frame = _optional("polars", "to_polars").DataFrame
        return frame(self.to_dicts(), infer_schema_length=None)

    def table(self, metric: str = "hit") -> str:
        """A table of one metric: a row a competitor, a column a size. See
        ``hybridcache.lab.report.METRICS``."""
        from hybridcache.lab.report import sweep_table

        return sweep_table(self, metric)

    def write_jsonl(self, path: str | Path) -> None:
        """Every run as one JSON line."""
        from hybridcache.lab.report import write_runs

        write_runs(self, Path(path))

    def figure(self, path: str | Path | None = None, metric: Words = "hit") -> Figure:
        """Metrics over the sizes, a panel each: matplotlib's figure, written as PNG or SVG where
        there is a ``path``."""
        from hybridcache.lab.figures import sweep_figure

        return sweep_figure([self], Path(path) if path else None, metric)

    def bins_figure(self, path: str | Path | None = None, gib: float | None = None) -> Figure:
        """Token hit rate by prompt length and by turn at the size nearest to ``gib``; None: in the
        middle."""
        from hybridcache.lab.figures import bins_figure

        return bins_figure([self], Path(path) if path else None, gib)

    def losses_figure(self, path: str | Path | None = None) -> Figure:
        """Where the prompt tokens went over the sizes, a panel a competitor."""
        from hybridcache.lab.figures import losses_figure

        return losses_figure([self], Path(path) if path else None)


def _optional(package: str, method: str) -> ModuleType:
    """Import a package that no extra installs, or explain how to get it."""
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ModuleNotFoundError(
            f"{method}() needs {package}, which is not installed: pip install {package}. "
            "to_dicts() returns the same rows without it.",
            name=package,
        ) from None


@dataclass(frozen=True, slots=True)
class Sweep:
    """What ``simulate`` runs: competitors, sizes, yardsticks, the machine around them, and how."""

    model: str | ModelGeometry = MODEL
    """A preset's name, the path of a config.json, or a geometry."""
    gib: str | float | Sequence[float] = GIB_SPEC
    """``low:high:points``, a list, or one number."""
    policy: Policies = DEFAULT_EVICTION
    """Words, ``module:Class(alpha=2)``, classes, functions that make a policy, or policies."""
    checkpoints: Policies = DEFAULT_PLACEMENT
    """One placement (words with commas, or your own) or a sequence of them."""
    baseline: Words = ()
    priority_classes: bool = True
    """False: no policy is helped by tiers; each orders dead KV and superseded checkpoints
    itself."""
    bound: bool = True
    """Also what an infinite token-granular cache reuses."""
    optimum: OptimumMethod | None = None
    """Also what the best plan with hindsight reuses at each size: ``greedy`` for long traces;
    ``lp`` adds what no plan can pass; ``milp`` improves the plan, practical up to a few hundred
    requests."""
    optimum_limit_s: float = LIMIT_S
    """At most so long for one size."""
    memory: str = "arena"
    """How KV and states share it: ``arena``, as in the engine; ``budget``, the ideal, where only
    bytes count; ``pools``, two, of which KV has ``kv_share``. Peers have their own."""
    kv_share: float | None = None
    host_gib: float = 0.0
    """GiB of host memory next to the device's ``gib``; 0 for none. Rebuilt peers that offload to
    the host (``baselines.HOST_TIERS``) get the same; others have none, and no peer has disk."""
    disk_gib: float = 0.0
    host_gb_s: float = PCIE_BYTES_PER_S / 1e9
    """From host memory to the device, GB/s."""
    disk_gb_s: float = DISK_BYTES_PER_S / 1e9
    state_dtype: str | None = None
    """None keeps the model's own."""
    checkpoint_dtype: str = "auto"
    """Of checkpoints alone, as the engine's ``--checkpoint-dtype``; for a model by name or path."""
    page_size: int = 1
    grid: int = GRID
    servers: int = 1
    max_running: int | None = None
    """None replays requests in turn."""
    times: str | PrefillTimes | None = None
    """A file of measured prefill times, or a model of your own; None: a roofline of as many H100 as
    hold the model."""
    processes: int = 1
    """Changes no result."""
    ray: str | None = None
    """Address of a Ray cluster that computes the runs, in place of ``processes``."""
    resume_from: str | Path | None = None
    """JSON lines: runs that it has are read, new ones appended."""
    progress: Callable[[int, int], None] | None = None
    """Called with (runs done, all)."""

    def geometry(self) -> ModelGeometry:
        """The model, with states of the precision asked for."""
        found = self.model
        if isinstance(found, str):
            found = ModelGeometry.load(found, checkpoint_dtype=self.checkpoint_dtype)
        if found.num_linear_layers and self.state_dtype is not None:
            return found.with_state_dtype(self.state_dtype)
        return found

    def serving(self, geometry: ModelGeometry) -> Serving:
        """The machine around the caches."""
        times = MeasuredTimes.load(self.times) if isinstance(self.times, str) else self.times
        return Serving(times or Roofline.fitting(geometry), self.servers, self.max_running)

    def competitors(self, geometry: ModelGeometry) -> list[RunConfig]:
        """One config each, without a size: every policy with every placement, then every peer.

        ValueError for one that can not be, for none, and for two that no table could tell apart."""
        common = RunConfig(
            geometry,
            memory=self.memory,
            kv_share=self.kv_share,
            page_size=self.page_size,
            grid=self.grid,
            dead_first=self.priority_classes,
            demote_superseded=self.priority_classes,
            host_bytes=tier_bytes("host", self.host_gib),
            disk_bytes=tier_bytes("disk", self.disk_gib),
            host_bytes_per_s=self.host_gb_s * 1e9,
            disk_bytes_per_s=self.disk_gb_s * 1e9,
        )
        found = [
            replace(common, policy=policy, checkpoints=placement)
            for policy in _policies(self.policy)
            for placement in _policies(self.checkpoints)
        ]
        peers = (self.baseline,) if isinstance(self.baseline, str) else self.baseline
        found += [
            replace(
                common,
                baseline=word,
                host_bytes=common.host_bytes if word in HOST_TIERS else 0,
                disk_bytes=0,
            )
            for word in peers
        ]
        if not found:
            raise ValueError("nothing to simulate: no policy, and no baseline")
        labels = [config.label for config in found]
        for config in found:
            check_words(config)
            if labels.count(config.label) > 1:
                raise ValueError(
                    f"two competitors are called {config.label!r}: name each once, and give "
                    "functions names"
                )
        return found


def simulate(trace: str | Trace, sweep: Sweep | None = None, **options: Any) -> SimulationResult:
    """Run every policy with every placement, and every baseline, at every size.

    ``trace``: what ``open_trace`` takes, or a ``Trace``. ``options`` are the fields of ``Sweep``,
    whose other values are those of ``sweep``, or its defaults. Each cell stands for itself, so
    results do not depend on ``processes``. O(requests) a cell. Raises ValueError, KeyError (model)
    or OSError, each with one sentence, for what can not be read or done; TypeError for an option
    that does not exist.
    """
    sweep = replace(sweep or Sweep(), **options)
    opened = open_trace(trace) if isinstance(trace, str) else trace
    geometry = sweep.geometry()
    serving = sweep.serving(geometry)
    competitors = sweep.competitors(geometry)
    points = sizes(sweep.gib)
    jobs = [
        Job(replace(config, budget_bytes=budget_bytes(size)), serving)
        for config in competitors
        for size in points
    ]
    kept = Path(sweep.resume_from) if sweep.resume_from else None
    runs = run_sweep(
        opened,
        jobs,
        processes=sweep.processes,
        ray=sweep.ray,
        resume_from=kept,
        progress=sweep.progress,
    )
    is_known = isinstance(serving.times, Roofline | MeasuredTimes)
    result = SimulationResult(
        opened.name,
        geometry,
        tuple(runs),
        None,
        times=describe_times(serving.times) if is_known else "",
    )
    if sweep.bound:
        result = _beside_the_bound(result, opened)
    if sweep.optimum is not None:
        result = _beside_the_optimum(result, opened, sweep, sweep.optimum)
    if kept and (sweep.bound or sweep.optimum):
        identity = identity_of(opened)
        _complete(kept, [job.key(identity) for job in jobs], result.runs, result.plan_bounds)
    return result


def _beside_the_bound(result: SimulationResult, trace: Trace) -> SimulationResult:
    """With what an infinite token-granular cache reuses. O(tokens)."""
    cache = InfiniteCache()
    tokens = sum(cache.ideal_tokens(request, trace.unit) for request in trace)
    runs = tuple(replace(run, bound_tokens=tokens) for run in result.runs)
    return replace(result, runs=runs, bound_rate=tokens / runs[0].prompt_tokens)


def _beside_the_optimum(
    result: SimulationResult, trace: Trace, sweep: Sweep, method: OptimumMethod
) -> SimulationResult:
    """With the best plan at each size."""
    best = {
        budget_bytes(size) / GIB: _best_possible(
            trace, result.geometry, budget_bytes(size), sweep, method
        )
        for size in sizes(sweep.gib)
    }
    runs = tuple(
        replace(run, optimum_tokens=int(best[run.gib or 0.0].cached_tokens.sum()))
        for run in result.runs
    )
    bounds = {gib: plan.bound for gib, plan in best.items() if plan.bound is not None}
    plans_by = {gib: plan.plan_by for gib, plan in best.items()}
    return replace(result, runs=runs, plan_bounds=bounds, plans_by=plans_by)


def _complete(
    path: Path, keys: Sequence[str], runs: Sequence[RunResult], bounds: Mapping[float, float]
) -> None:
    """Write the yardsticks into the lines of ``path`` that were written run by run, before they
    were known."""
    known = {}
    for key, run in zip(keys, runs, strict=True):
        bound = bounds.get(run.gib or 0.0)
        known[key] = run.as_record() | ({} if bound is None else {"plan_bound": bound})
    whole = path.with_name(path.name + ".new")
    with path.open(encoding="utf-8") as lines, whole.open("w", encoding="utf-8") as file:
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # half a line, left by a process that was killed
            file.write(json.dumps(record | known.get(record.get("key"), {})) + "\n")
    whole.replace(path)


def _best_possible(
    trace: Trace,
    geometry: ModelGeometry,
    capacity_bytes: int,
    sweep: Sweep,
    method: OptimumMethod,
) -> Optimum:
    """The offline plan at one size: proven best within the solver's gap for ``milp``, else the best
    known."""
    from hybridcache.lab.optimum import lower_budgets, optimum

    lower = lower_budgets(
        geometry,
        (tier_bytes("host", sweep.host_gib), sweep.host_gb_s * 1e9),
        (tier_bytes("disk", sweep.disk_gib), sweep.disk_gb_s * 1e9),
    )
    return optimum(
        trace,
        capacity_bytes=capacity_bytes,
        kv_bytes_per_token=geometry.kv_bytes_per_token,
        state_bytes=geometry.state_bytes,
        grid=sweep.grid,
        method=method,
        limit_s=sweep.optimum_limit_s,
        lower=lower,
    )


def _policies(given: Policies) -> tuple[str | OwnPolicy, ...]:
    several = given if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
    return tuple(map(_policy, several))


def _policy(one: Policy) -> str | OwnPolicy:
    """A class by its word where it has one, so that other processes find it."""
    if isinstance(one, str):
        return one
    return (isinstance(one, type) and spec_of(one)) or own_policy(one)
