"""Replay a trace through caches: who wins, at which size, and why each token was lost.

>>> from hybridcache.lab.simulation.simulate import simulate
>>> result = simulate("short", gib="1:8:3", policy=("lru", "fifo"))
>>> [run.label for run in result.runs]
['lru', 'lru', 'lru', 'fifo', 'fifo', 'fifo']
>>> all(run.token_hit_rate <= result.bound_rate for run in result.runs)
True
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.times import MeasuredTimes, PrefillTimes, Roofline
from hybridcache.lab.infinite import InfiniteCache
from hybridcache.lab.simulation.result import RunResult
from hybridcache.lab.simulation.serving import Serving
from hybridcache.lab.simulation.sizes import budget_bytes, sizes
from hybridcache.lab.simulation.sweep import Job, identity_of, run_sweep
from hybridcache.lab.simulation.target import DEFAULT_CHECKPOINTS, RunConfig, check_words
from hybridcache.lab.trace import Trace
from hybridcache.lab.traces import open_trace
from hybridcache.policies.user import OwnPolicy, own_policy, word_of
from hybridcache.policies.words import EvictionSpec, PlacementSpec
from hybridcache.units import GIB

if TYPE_CHECKING:
    from hybridcache.lab.optimum import Optimum

DEFAULT_GIB = "2:200:15"

Words = str | Sequence[str]
Policy = EvictionSpec | PlacementSpec
Policies = Policy | Sequence[Policy]
OptimumMethod = Literal["greedy", "lp", "milp"]


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """All runs of one sweep over one trace: by policy and placement, then by size; then the rebuilt peers."""

    trace: str
    geometry: ModelGeometry
    runs: tuple[RunResult, ...]
    bound_rate: float | None
    """Token hit rate of an infinite token-granular cache; None where it was not asked for."""
    plan_bounds: Mapping[float, float] = field(default_factory=dict)
    """Token hit rate that no policy can pass at each size in GiB, where ``lp`` or ``milp`` proved one."""
    times: str = ""
    """What the prefill times stand for: the machine assumed or the file measured; empty where a model of the user's own gives them."""
    plans_by: Mapping[float, str] = field(default_factory=dict)
    """Whose the best plan is at each size in GiB, ``greedy`` or ``milp``, where one was asked for."""

    def beside(self, other: SimulationResult) -> SimulationResult:
        """These runs and those of another sweep over the same trace, measured with the same yardsticks."""
        yardsticks = {run.gib: run for run in self.runs}
        added = []
        for run in other.runs:
            known = yardsticks.get(run.gib, run)
            added.append(
                replace(run, bound_tokens=known.bound_tokens, optimum_tokens=known.optimum_tokens)
            )
        return replace(self, runs=(*self.runs, *added))

    def by_label(self) -> dict[str, list[RunResult]]:
        """Runs of each competitor, by size."""
        found: dict[str, list[RunResult]] = {}
        for run in self.runs:
            found.setdefault(run.label, []).append(run)
        return found

    def best(self, gib: float) -> RunResult:
        """The run of highest token hit rate at the size nearest to ``gib``."""
        nearest = min((run.gib or 0.0 for run in self.runs), key=lambda size: abs(size - gib))
        return max(
            (run for run in self.runs if run.gib == nearest), key=lambda run: run.token_hit_rate
        )

    def table(self, metric: str = "hit") -> str:
        """A table of one metric: a row a competitor, a column a size. See ``hybridcache.lab.report.METRICS``."""
        from hybridcache.lab.report import sweep_table

        return sweep_table(self, metric)

    def write_jsonl(self, path: str | Path) -> None:
        """Every run as one JSON line."""
        from hybridcache.lab.report import write_runs

        write_runs(self, Path(path))

    def figure(self, path: str | Path, metric: Words = "hit") -> None:
        """Metrics over the sizes as PNG or SVG, a panel each."""
        from hybridcache.lab.figures import sweep_figure

        sweep_figure([self], Path(path), metric)

    def bins_figure(self, path: str | Path, gib: float | None = None) -> None:
        """Token hit rate by prompt length and by turn at the size nearest to ``gib``; None: in the middle."""
        from hybridcache.lab.figures import bins_figure

        bins_figure([self], Path(path), gib)

    def losses_figure(self, path: str | Path) -> None:
        """Where the prompt tokens went over the sizes, a panel a competitor."""
        from hybridcache.lab.figures import losses_figure

        losses_figure([self], Path(path))


def simulate(
    trace: str | Trace,
    *,
    model: str | ModelGeometry = "qwen3-next",
    gib: str | float | Sequence[float] = DEFAULT_GIB,
    policy: Policies = "lru",
    checkpoints: Policies = DEFAULT_CHECKPOINTS,
    baseline: Words = (),
    bound: bool = True,
    optimum: OptimumMethod | None = None,
    optimum_limit_s: float = 60.0,
    memory: str = "arena",
    kv_share: float | None = None,
    state_dtype: str | None = None,
    page_size: int = 1,
    grid: int = 64,
    servers: int = 1,
    max_running: int | None = None,
    times: str | PrefillTimes | None = None,
    processes: int = 1,
    resume_from: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SimulationResult:
    """Run every policy with every placement, and every baseline, at every size.

    ``trace``: what ``open_trace`` takes, or a ``Trace``. ``gib``: ``low:high:points``, a list, or one number. ``policy``: words,
    ``module:Class`` or classes. ``checkpoints``: one placement (words with commas, or a class) or a sequence of them. ``times``: a file of measured prefill
    times, or a model of your own; default: a roofline of as many H100 as hold the model. ``max_running``: None replays requests in turn.
    ``memory``: ``arena``, which KV and states share as in the engine; ``budget``, the ideal, where only bytes count; ``pools``, two, of
    which KV has ``kv_share``. Peers have their own. ``state_dtype``: None keeps the model's own. Each cell of the sweep stands for itself, so results do not depend on ``processes``.
    ``optimum``: also what the best plan with hindsight reuses at each size (``greedy`` for long traces; ``lp`` adds what no plan can
    pass; ``milp`` betters the plan, for some hundred requests), with at most ``optimum_limit_s`` a size. O(requests) a cell. Raises ValueError, KeyError (model) or OSError, each with
    one sentence, for what can not be read or done.
    """
    opened = open_trace(trace) if isinstance(trace, str) else trace
    geometry = ModelGeometry.load(model) if isinstance(model, str) else model
    if geometry.num_linear_layers and state_dtype is not None:
        geometry = geometry.with_state_dtype(state_dtype)
    timing = (
        MeasuredTimes.load(times) if isinstance(times, str) else times or Roofline.fitting(geometry)
    )
    said = f"measured, {times}" if isinstance(times, str) else ""
    if isinstance(timing, Roofline):
        said = timing.describe()
    serving = Serving(timing, servers, max_running)
    common = RunConfig(geometry, memory=memory, kv_share=kv_share, page_size=page_size, grid=grid)
    competitors = [
        replace(common, policy=word, checkpoints=placement)
        for word in _policies(policy)
        for placement in _policies(checkpoints)
    ]
    competitors += [
        replace(common, baseline=word)
        for word in ((baseline,) if isinstance(baseline, str) else baseline)
    ]
    if not competitors:
        raise ValueError("nothing to simulate: no policy, and no baseline")
    for config in competitors:
        check_words(config)
    jobs = [
        Job(replace(config, budget_bytes=budget_bytes(size)), serving)
        for config in competitors
        for size in sizes(gib)
    ]
    runs = run_sweep(
        opened,
        jobs,
        processes=processes,
        resume_from=Path(resume_from) if resume_from else None,
        progress=progress,
    )
    bound_rate = None
    if bound:
        cache = InfiniteCache()
        bound_tokens = sum(cache.ideal_tokens(request, opened.unit) for request in opened)
        bound_rate = bound_tokens / runs[0].prompt_tokens
        runs = [replace(run, bound_tokens=bound_tokens) for run in runs]
    bounds: dict[float, float] = {}
    plans_by: dict[float, str] = {}
    if optimum is not None:
        best = {
            size: _best_possible(
                opened, geometry, budget_bytes(size), grid, optimum, optimum_limit_s
            )
            for size in sizes(gib)
        }
        runs = [
            replace(run, optimum_tokens=int(best[size].cached_tokens.sum()))
            for run, size in zip(runs, sizes(gib) * len(competitors), strict=True)
        ]
        bounds = {
            budget_bytes(size) / GIB: plan.bound
            for size, plan in best.items()
            if plan.bound is not None
        }
        plans_by = {budget_bytes(size) / GIB: plan.plan_by for size, plan in best.items()}
    if resume_from and (bound or optimum):
        identity = identity_of(opened)
        _complete(Path(resume_from), [job.key(identity) for job in jobs], runs, bounds)
    return SimulationResult(opened.name, geometry, tuple(runs), bound_rate, bounds, said, plans_by)


def _complete(
    path: Path, keys: Sequence[str], runs: Sequence[RunResult], bounds: Mapping[float, float]
) -> None:
    """Write the yardsticks into the lines of ``path`` that were written run by run, before they were known."""
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
    grid: int,
    method: OptimumMethod,
    limit_s: float,
) -> Optimum:
    """The offline plan at one size: proven best within the solver's gap for ``milp``, else the best known."""
    from hybridcache.lab.optimum import optimum

    return optimum(
        trace,
        capacity_bytes=capacity_bytes,
        kv_bytes_per_token=geometry.kv_bytes_per_token,
        state_bytes=geometry.state_bytes,
        grid=grid,
        method=method,
        limit_s=limit_s,
    )


def _policies(given: Policies) -> tuple[str | OwnPolicy, ...]:
    several = given if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
    return tuple(map(_policy, several))


def _policy(one: Policy) -> str | OwnPolicy:
    """A class by its word where it has one, so that other processes find it."""
    if isinstance(one, str):
        return one
    return (isinstance(one, type) and word_of(one)) or own_policy(one)
