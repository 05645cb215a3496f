"""Simulation of a trace with several policies and sizes, and the offline optimum.

>>> from hybridcache.lab.simulation.simulate import optimum, simulate
>>> result = simulate("short", gib="1:8:3", policy=("survival", "lru"))

There is one run per policy and size:

>>> [run.label for run in result.runs]
['survival', 'survival', 'survival', 'lru', 'lru', 'lru']

No policy exceeds the bound, and the optimum of one size exceeds both:

>>> all(run.token_hit_rate <= result.bound_rate for run in result.runs)
True
>>> [plan] = optimum("short", gib=1)
>>> plan.reached > result.runs[0].token_hit_rate
True
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from hybridcache.geometry.times import MeasuredTimes, Roofline, describe_times
from hybridcache.geometry.units import counted
from hybridcache.lab.infinite import InfiniteCache
from hybridcache.lab.optimum import Optimum, best_plan
from hybridcache.lab.progress import Progress, shown_progress
from hybridcache.lab.scenario import GIB_SPEC, Scenario
from hybridcache.lab.simulation.grid import Kept, check_flags, run_grid
from hybridcache.lab.simulation.result import RunResult, SweepRuns, failure_of, summarise
from hybridcache.lab.simulation.serving import serve
from hybridcache.lab.simulation.sizes import budget_bytes, has_shares, sizes_for, working_set_bytes
from hybridcache.lab.simulation.target import build_target
from hybridcache.lab.trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True, repr=False)
class SimulationResult(SweepRuns):
    """All runs of one sweep over one trace, with their tables and figures."""

    def __repr__(self) -> str:
        """Return one line: trace, number of runs, and the best of them."""
        from hybridcache.lab.report import sweep_line

        return f"{type(self).__name__}({sweep_line(self)})"

    def _repr_html_(self) -> str:
        """Return the table of token hit rates for a notebook."""
        return f"<pre>{escape(self.table())}</pre>"

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return a flat dictionary per run: its settings, rates, times and lost tokens by cause.

        Loss causes are ``lost_`` and the cause; None where a rebuilt peer does not tell. Warns if
        runs failed, because they have no dictionary. O(runs).
        """
        if self.failures:
            failed = counted(len(self.failures), "run")
            warnings.warn(f"{failed} failed, see failures: {self.failures[0]}", stacklevel=2)
        return [run.as_row() for run in self.runs]

    def table(self, metric: str = "hit") -> str:
        """Return a table of one of ``hybridcache.lab.report.METRICS``: a row per competitor, a
        column per size."""
        from hybridcache.lab.report import sweep_table

        return "\n".join([sweep_table(self, metric), *self.failures])

    def verdict(self) -> str:
        """Return one sentence: the policies with the most hits, and the command that serves with
        them. Rebuilt systems with more hits are named. Empty if there is nothing to choose
        from."""
        from hybridcache.lab.report import verdict

        return verdict(self)

    def figure(
        self,
        path: str | Path | None = None,
        metric: str | Sequence[str] | None = None,
    ) -> Figure:
        """Draw metrics over the sizes, a panel each; by default the token hit rate, and its share
        of the best plan if the result has plans. The figure is also written to ``path`` (PNG,
        SVG or PDF), if there is one."""
        from hybridcache.lab.figures import sweep_figure

        return sweep_figure([self], path, metric)

    def losses_figure(self, path: str | Path | None = None) -> Figure:
        """Draw the prompt tokens by loss cause over the sizes, a panel per competitor."""
        from hybridcache.lab.figures import losses_figure

        return losses_figure([self], path)


@dataclass(frozen=True, slots=True, repr=False)
class OptimumResult(Sequence[Optimum]):
    """Plans with hindsight for one trace, by size: a sequence of ``Optimum``."""

    plans: tuple[Optimum, ...]
    """One per size."""

    def __len__(self) -> int:
        return len(self.plans)

    def __getitem__(self, index: Any) -> Any:
        return self.plans[index]

    def __repr__(self) -> str:
        """Return one line: trace, and the token hit rate at each size."""
        first = self.plans[0]
        rates = ", ".join(
            f"{100 * plan.reached:.1f} % at {plan.gib:.4g} GiB" for plan in self.plans
        )
        return f"{type(self).__name__}({first.trace}: {rates})"

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return a flat dictionary per size: ``gib``, ``reached`` and ``bound`` as token hit rates.
        O(sizes)."""
        return [plan.record() for plan in self.plans]

    def table(self) -> str:
        """Return a table: plan, bound and gap, a row per size."""
        from hybridcache.lab.report import optimum_table

        return optimum_table(self.plans)

    def figure(self, path: str | Path | None = None) -> Figure:
        """Draw plan and bound over the sizes. The figure is also written to ``path`` (PNG, SVG or
        PDF), if there is one."""
        from hybridcache.lab.figures import optimum_figure

        return optimum_figure(self.plans, path)


def simulate(
    scenario: Scenario | str | Trace,
    *,
    bound: bool = True,
    optimum: bool = False,
    processes: int = 1,
    ray: str | None = None,
    resume_from: str | Path | None = None,
    progress: Progress = None,
    **settings: Any,
) -> SimulationResult:
    """Replay a trace with every policy and placement, and every baseline, at every size.

    - ``scenario``: a ``Scenario``, or a trace (a specification that ``open_trace`` reads, or a
      ``Trace``). ``settings`` are fields of ``Scenario``, and replace its own: ``model``, ``gib``,
      ``policy``, ``checkpoints``, ``baseline`` and others.
    - ``bound``: also compute the reuse of an infinite token-granular cache.
    - ``optimum``: also compute a plan with hindsight at each size, for the device's memory alone.
    - ``processes``, ``ray``: runs at the same time, or the address of a Ray cluster for them;
      changes no result.
    - ``resume_from``: file of JSON lines; its runs are read, new ones are appended.
    - ``progress``: function of (runs done, all); False for none. By default a bar in terminals and
      notebooks.

    Policies may be names, ``module:Class(alpha=2)``, classes, functions that make a policy, or
    policies. O(requests) per run. Raises ValueError or OSError, each with one sentence, for invalid
    arguments, settings of ``closed_loop`` and unreadable files; TypeError for a setting that does
    not exist.
    """
    check_flags(bound=bound, optimum=optimum)
    kept = Kept.of(resume_from, RunResult)
    asked = Scenario.of(scenario, settings)
    asked.refuse_load()
    opened = asked.opened()
    if optimum and (asked.host_gib or asked.disk_gib):
        raise ValueError(
            "optimum plans the device's memory alone: leave it out, or host_gib and disk_gib."
        )
    geometry = asked.geometry()
    times = asked.prefill_times(geometry)
    spec = GIB_SPEC if asked.gib is None else asked.gib
    points = sizes_for(spec, opened, geometry, max(asked.page_size, opened.unit))
    cells = replace(asked, trace=opened.full_name).cells(points)
    yardsticks: dict[float, dict[str, Any]] = {size: {} for size in points}
    if bound:
        cache = InfiniteCache()
        tokens = sum(cache.ideal_tokens(request, opened.unit) for request in opened)
        yardsticks = {size: {"bound_tokens": tokens} for size in points}
    if optimum:
        for size, found in yardsticks.items():
            found["optimum_tokens"] = int(_plan(opened, asked, size).cached_tokens.sum())
    run = partial(run_cell, yardsticks=yardsticks)
    runs, failures = run_grid(
        opened, cells, run, processes=processes, ray=ray, kept=kept, progress=progress
    )
    # Runs in a file may have been computed without them.
    runs = [replace(one, **yardsticks[one.gib]) for one in runs]
    return SimulationResult(
        opened.name,
        geometry,
        tuple(runs),
        tokens / runs[0].prompt_tokens if bound else None,
        times=describe_times(times) if isinstance(times, Roofline | MeasuredTimes) else "",
        counted_by=opened.counted_by,
        failures=tuple(failure_of(cells[number], words) for number, words in failures.items()),
        working_set_bytes=working_set_bytes(opened, geometry) if has_shares(asked.gib) else 0,
    )


def run_cell(
    trace: Trace, cell: Scenario, yardsticks: Mapping[float, dict[str, Any]] = MappingProxyType({})
) -> RunResult:
    """Replay ``trace`` through the one cache of ``cell``. ``yardsticks`` are fields of the result
    that no policy changes, by size."""
    cell = replace(cell, model=cell.geometry(), state_dtype=None)  # Read the model once.
    target = build_target(cell, trace.unit)
    log = serve(target, trace.in_order(), trace.unit, cell)
    result = summarise(cell, log, target, trace.full_name)
    if not result.requests:
        raise ValueError(f"{trace.name}: {trace.is_empty_because}")
    return replace(result, **yardsticks.get(cell.size_gib, {}))


OF_PLANS = {"model", "gib", "state_dtype", "checkpoint_dtype", "grid"}
"""Settings with an effect on the optimum."""


def optimum(
    scenario: Scenario | str | Trace,
    *,
    counts_running: bool = False,
    progress: Progress = None,
    **settings: Any,
) -> OptimumResult:
    """Compute a plan with hindsight at every size, and the bound of an infinite cache.

    ``scenario`` may be that of a ``simulate``: its model, sizes, precisions and grid have an
    effect, and ``settings`` may name these alone. ``counts_running``: KV and state of the running
    request take memory too, as in every cache. Raises the errors of ``simulate``.
    """
    check_flags(counts_running=counts_running)
    asked = Scenario.of(scenario, settings)
    asked.refuse(settings.keys() - OF_PLANS, "has no effect on the optimum: leave it out")
    opened = asked.opened().kept()
    spec = GIB_SPEC if asked.gib is None else asked.gib
    points = sizes_for(spec, opened, asked.geometry(), opened.unit)
    plans = []
    with shown_progress(progress, "sizes", opened.name) as show:
        for done, size in enumerate(points):
            show(done, len(points))
            plans.append(_plan(opened, asked, size, counts_running))
        show(len(points), len(points))
    return OptimumResult(tuple(plans))


def _plan(trace: Trace, asked: Scenario, size: float, counts_running: bool = False) -> Optimum:
    """Return the best plan for a memory of ``size`` GiB."""
    geometry = asked.geometry()
    found = best_plan(
        trace,
        capacity_bytes=budget_bytes(size),
        kv_bytes_per_token=geometry.kv_bytes_per_token,
        state_bytes=geometry.state_bytes,
        grid=asked.grid,
        counts_running=counts_running,
    )
    return replace(found, gib=size)
