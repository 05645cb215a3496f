"""Simulation of a trace with several policies and sizes, and the offline optimum.

>>> result = simulate("short", gib="1:8:3", policy=("survival", "lru"))
>>> all(run.token_hit_rate <= result.bound_rate for run in result.runs)
True
>>> [plan] = optimum("short", gib=1)
>>> plan.reached > result.runs[0].token_hit_rate
True
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from hybridcache.geometry.model import BUILTIN
from hybridcache.geometry.times import MeasuredTimes, Roofline
from hybridcache.geometry.units import GIB, counted
from hybridcache.lab.results.figures import losses_figure, sweep_figure
from hybridcache.lab.results.report import (
    TIE,
    find_metric,
    hindsight_percent,
    interval_notes,
    leading,
    limit_percent,
    marked,
    most_hits,
    notes_on,
    size_label,
    to_serve,
)
from hybridcache.lab.results.result import Plain, RunResult, SweepRuns, grouped, merged, text_table
from hybridcache.lab.rivals.optimum import Optimum, best_plan
from hybridcache.lab.runs.grid import KEEP_BYTES, RunFailed, run_grid
from hybridcache.lab.runs.serving import serve
from hybridcache.lab.runs.summary import describe_times, summarise
from hybridcache.lab.runs.target import build_target
from hybridcache.lab.scenario import LOAD, Scenario, seeds_of, settings_of
from hybridcache.lab.traces import open_trace, seeded
from hybridcache.lab.traces.prefix_tree import InfiniteCache
from hybridcache.lab.traces.progress import Progress, shown_progress
from hybridcache.lab.traces.statistics import doubts
from hybridcache.lab.traces.trace import Tabular, Trace
from hybridcache.policies.registry import DEFAULT_EVICTION
from hybridcache.radix.tokens import require_bool

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True, repr=False)
class SimulationResult(SweepRuns):
    """All runs of one sweep over one trace, with their tables and figures."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.trace}: {counted(len(self.runs), 'run')})"

    def table(self, metric: str | Sequence[str] = "hit") -> str:
        """Return a table of each metric, one or several of ``METRICS`` in
        ``hybridcache.lab.results.report``: a row per competitor, a column per size. Notes follow
        the last one. Token hit rates have half of their 95 % interval over sessions, and rows of
        the plan and the infinite cache.
        """
        metrics = [metric] if isinstance(metric, str) else [*metric]
        tables = [self._table(one) for one in metrics]
        notes = interval_notes(self) if "hit" in metrics else []
        notes += [*notes_on(self, metrics), *self.failures]
        return "\n".join(["\n\n".join(tables), *notes])

    def _table(self, metric: str) -> str:
        """Return the table of one metric without notes."""
        found, by_label = find_metric(metric), self.by_label()
        by_size = {run.gib: run for run in sorted(self.runs, key=lambda run: run.gib)}
        first = list(by_size.values())
        header = [f"{found.title}, at GiB", *(size_label(run) for run in first)]
        rows, too_large = [], []
        for label, runs in by_label.items():
            cells = {run.gib: marked(run, metric) for run in runs}
            rows.append([label, *(cells.get(size, "-") for size in by_size)])
            counts = [f"{run.bypassed:,} at {size_label(run)} GiB" for run in runs if run.bypassed]
            if counts:
                too_large.append(
                    f"requests of {label} computed without the cache, because they do not fit: "
                    + ", ".join(counts)
                )
        if metric == "hit" and any(run.optimum_tokens is not None for run in first):
            rows.append(["(with hindsight)", *(f"{hindsight_percent(run):.1f}" for run in first)])
            rows.append(["(upper bound)", *(f"{limit_percent(run):.1f}" for run in first)])
        if metric == "hit" and self.bound_rate is not None:
            rows.append(["(infinite cache)", *[f"{100 * self.bound_rate:.1f}"] * len(first)])
        title = f"{self.trace}, {self.geometry.name}"
        if first:
            title += f": {counted(first[0].requests, 'request')}, "
            title += counted(first[0].prompt_tokens, "prompt token")
        if whole := self.working_set_bytes:
            shares = (f"{100 * run.gib * GIB / whole:.3g}" for run in first)
            rows.append(["(% of working set)", *shares])
        return "\n".join([title, text_table(header, rows), *too_large])

    def verdict(self, model: str = "") -> str:
        """Return a line per size: the policy with the most hits, and those that do not differ from
        it (``report.most_hits``). A last line has the command that serves ``model`` with the
        highest mean over the sizes (``report.to_serve``), at the smallest size of its most hits
        among those where no other policy of our own has more; no command if there is none. Empty
        with fewer than two policies of our own. One draw of a trace gives no verdict: its intervals
        do not contain the chance of the draw.
        """
        ours = {
            label: {run.gib: run for run in runs}
            for label, runs in self.by_label().items()
            if runs[0].config["baseline"] is None
        }
        if len(ours) < 2:
            return ""
        if self.drawn_once:
            return f"one draw of the {self.drawn_once}: run --seeds 5 to compare policies"
        said, first = dict[str, list[str]](), dict[float, RunResult]()
        for gib in sorted({gib for runs in ours.values() for gib in runs}):
            first[gib], text = most_hits([run for run in self.runs if run.gib == gib], self.units)
            said.setdefault(text, []).append(size_label(first[gib]))
        lines = [f"at {', '.join(sizes)} GiB: {text}" for text, sizes in said.items()]
        means = {
            label: fmean(run.token_hit_rate for run in runs.values())
            for label, runs in ours.items()
            if runs.keys() == first.keys()  # none failed
        }
        best = max(means, key=means.__getitem__, default="")
        if not means.get(best):
            return "\n".join(lines)
        equal = [label for label, of_all in means.items() if of_all == means[best]]
        best = next((one for one in equal if one.partition("@")[0] == DEFAULT_EVICTION), best)
        mean = f"in the mean of {len(first)} sizes, {leading(equal)}"
        leads = [
            run
            for gib, run in ours[best].items()
            if run.token_hit_rate > first[gib].token_hit_rate - TIE
        ]
        if not leads:
            return "\n".join([*lines, f"{mean}, but at none of them"])
        enough = max(run.token_hit_rate for run in leads) - TIE
        served = min((run for run in leads if run.token_hit_rate > enough), key=lambda run: run.gib)
        if self.geometry.name == BUILTIN:
            model = model or BUILTIN
        return "\n".join([*lines, f"{mean}; " * (len(first) > 1) + to_serve(served, model)])

    def figure(
        self,
        path: str | Path | None = None,
        metric: str | Sequence[str] | None = None,
        *,
        size: tuple[float, float] | None = None,
        title: bool | str = True,
        legend: bool = True,
    ) -> Figure:
        """Draw metrics over the sizes, a panel each; by default the token hit rate, and its share
        of the best plan if the result has plans. The figure is also written to ``path`` (PNG,
        SVG or PDF), if there is one. ``size``: width and height in inches, such as (3.3, 2.6) for
        a column of a paper; ``title=False`` leaves out title and notes, a text replaces the
        title; ``legend=False`` leaves out the legend, which is always below the panels.
        ValueError for other values."""
        return sweep_figure([self], path, metric, size, title, legend)

    def losses_figure(
        self,
        path: str | Path | None = None,
        *,
        size: tuple[float, float] | None = None,
        title: bool | str = True,
        legend: bool = True,
    ) -> Figure:
        """Draw the prompt tokens by loss cause over the sizes, a panel per competitor. Arguments
        are those of ``figure``; panels keep the competitor's name."""
        return losses_figure([self], path, size, title, legend)


@dataclass(frozen=True, slots=True, repr=False)
class OptimumResult(Tabular, Sequence[Optimum]):
    """Plans with hindsight for one trace, by size: a sequence of ``Optimum``."""

    plans: tuple[Optimum, ...]
    model: str
    trace_notes: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.plans)

    def __getitem__(self, index: Any) -> Any:
        return self.plans[index]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.plans[0].trace}: {counted(len(self), 'size')})"

    def to_dicts(self) -> list[Plain]:
        """Return a dictionary per size; ``cached_tokens``, of all requests, are left out."""
        names = "trace", "gib", "num_requests", "prompt_tokens", "reached", "bound", "gap"
        return [{name: getattr(one, name) for name in names} for one in self.plans]

    def table(self) -> str:
        """Return a table with a row per size: hit rate of the plan, bound and gap."""
        rows = []
        for best in self.plans:
            shares = (f"{100 * part:.2f}" for part in (best.reached, best.bound, best.gap))
            rows.append([f"{best.gib:.3g}", *shares])
        requests = counted(self.plans[0].num_requests, "request")
        table = text_table(["GiB", "reached, %", "bound, %", "gap, %"], rows)
        title = f"{self.plans[0].trace}, {self.model}: {requests}"
        note = "reached: by a greedy plan, which is not always the optimum; bound: of every cache"
        return "\n".join([title, table, note, *self.trace_notes])


def simulate(
    trace: Scenario | str | Trace,
    *,
    bound: bool = True,
    optimum: bool = False,
    processes: int = 1,
    ray: str | None = None,
    resume_from: str | Path | None = None,
    progress: Progress = None,
    **settings: object,
) -> SimulationResult:
    """Replay a trace with every policy and placement, and every baseline, at every size.

    - ``trace``: a specification that ``open_trace`` reads, a ``Trace``, or a ``Scenario``.
      ``settings`` are fields of ``Scenario``, and replace its own. Policies may be
      names, ``module:Class(alpha=2)``, classes, functions that make a policy, or policies.
    - ``bound``, ``optimum``: also compute the reuse of an infinite token-granular cache; a plan
      with hindsight and an upper bound at each size, for the device's memory alone.
    - ``processes``, ``ray``: runs at the same time, or a Ray cluster's address; changes no result.
      Each process runs the calling script again: call below ``if __name__ == "__main__":``.
    - ``resume_from``: file of JSON lines; its runs are read, new ones are appended.
    - ``progress``: function of (runs done, all); False for none; by default a bar.

    O(requests) per run. ValueError or OSError, each with one sentence, for invalid arguments and
    unreadable files; TypeError for an unknown setting.
    """
    require_bool(bound, "bound")
    require_bool(optimum, "optimum")
    asked = Scenario.of(trace, settings)
    asked.refuse(
        settings_of(LOAD),
        "is about sessions that wait for answers: add --closed-loop, or call closed_loop(...)",
    )
    place: Plain = {"processes": processes, "ray": ray, "resume_from": resume_from}
    place["progress"] = progress
    if asked.seeds != 1:
        return _over_seeds(asked, place | {"bound": bound, "optimum": optimum})
    opened = asked.opened()
    if optimum and (asked.host_gib or asked.disk_gib):
        raise ValueError(
            "optimum plans the device's memory alone: leave it out, or host_gib and disk_gib."
        )
    geometry = asked.geometry()
    times = asked.prefill_times(geometry)
    points, whole_bytes = asked.points(opened, max(asked.page_size, opened.unit))
    cells = replace(asked, trace=opened.full_name).cells(points)
    cache, held = InfiniteCache(), opened.kept() if optimum else opened
    tokens = sum(cache.ideal_tokens(one, opened.unit) for one in opened) if bound else 0
    of_bound: Plain = {"bound_tokens": tokens} if bound else {}
    yardsticks = {size: of_bound.copy() for size in points}
    for size in points if optimum else ():
        plan = best_plan(held, size, geometry, grid=asked.grid)
        yardsticks[size]["optimum_tokens"] = int(plan.cached_tokens.sum())
        yardsticks[size]["limit_tokens"] = round(plan.bound * plan.prompt_tokens)
    run = partial(run_cell, yardsticks=yardsticks)
    runs, failures = run_grid(opened, cells, run, kind=RunResult, **place)
    # Runs in a file may have been computed without them.
    runs, is_grouped = grouped([replace(one, **yardsticks[one.gib]) for one in runs], opened)
    bound_rate = tokens / runs[0].prompt_tokens if bound else None
    return SimulationResult(
        opened.name,
        geometry,
        runs,
        bound_rate,
        times=describe_times(times) if isinstance(times, Roofline | MeasuredTimes) else "",
        trace_notes=[*opened.notes, *(doubts(bound_rate) if bound_rate is not None else [])],
        failures=failures,
        working_set_bytes=whole_bytes,
        units="group" if is_grouped else "session",
        drawn_once=drawn_part(opened),
    )


def drawn_part(trace: Trace) -> str:
    """Return the part of a trace that a seed draws; empty if there is none."""
    if not trace.recipe or seeded(trace.recipe, 0) == seeded(trace.recipe, 1):
        return ""
    return "arrivals" if trace.arrivals else "trace"


def _over_seeds(asked: Scenario, options: Plain) -> SimulationResult:
    """Simulate each draw of the trace at the sizes of the first one, and merge the runs. ValueError
    if nothing of the trace is drawn."""
    opened, seeds = asked.opened(), seeds_of(asked)
    if not drawn_part(opened):
        raise ValueError(
            f"seeds must be left out for {opened.name}: no part is drawn, so no seed changes it. "
            "Its intervals are over sessions; a closed loop draws their arrivals."
        )
    traces = [seeded(opened.recipe, seed) for seed in seeds]
    first = open_trace(traces[0])
    points, whole_bytes = asked.points(first, max(asked.page_size, first.unit))
    results = [
        simulate(replace(asked, trace=trace, gib=points, seeds=1), **options) for trace in traces
    ]
    if failures := [one for result in results for one in result.failures]:
        raise RunFailed(failures[0])
    runs = tuple(merged(of, seeds) for of in zip(*(result.runs for result in results), strict=True))
    bound_tokens = runs[0].bound_tokens if options["bound"] else None
    part = "arrivals, the conversations are the same" if opened.arrivals else "trace"
    note = f"{counted(len(seeds), 'draw')} (--seeds) of the {part}: rates over all their tokens"
    return replace(
        results[0],
        runs=runs,
        bound_rate=None if not bound_tokens else bound_tokens / runs[0].prompt_tokens,
        trace_notes=[*results[0].trace_notes, note],
        working_set_bytes=whole_bytes,
        units="seed",
        drawn_once="",
    )


def run_cell(
    trace: Trace, cell: Scenario, yardsticks: Mapping[float, Plain] = MappingProxyType({})
) -> RunResult:
    """Replay ``trace`` through the one cache of ``cell``. ``yardsticks`` are fields of the result
    that no policy changes, by size."""
    cell = replace(cell, model=cell.geometry(), state_dtype=None)  # Read the model once.
    target = build_target(cell, trace.unit)
    log = serve(target, trace.in_order(), trace.unit, cell)
    result = summarise(cell, log, target, trace.full_name)
    if not result.requests:
        raise ValueError(f"{trace.name}: {trace.is_empty_because}")
    config = result.config | ({"arrivals": trace.arrivals} if trace.arrivals else {})
    return replace(result, config=config, **yardsticks.get(cell.size_gib, {}))


OF_PLANS = {"model", "gib", "state_dtype", "checkpoint_dtype", "grid"}


def optimum(
    trace: Scenario | str | Trace, *, progress: Progress = None, **settings: object
) -> OptimumResult:
    """Compute a plan with hindsight at every size, and a bound that no cache exceeds.

    ``trace`` may be the scenario of a ``simulate``: its model, sizes, precisions and grid have an
    effect, and ``settings`` may name these alone. Raises the errors of ``simulate``.
    """
    asked = Scenario.of(trace, settings)
    asked.refuse(settings.keys() - OF_PLANS, "has no effect on the optimum: leave it out")
    opened, geometry = asked.opened(), asked.geometry()
    points, _ = asked.points(opened, opened.unit)
    held, plans = opened.kept(KEEP_BYTES), list[Optimum]()
    with shown_progress(progress, "runs", opened.name) as show:
        for size in points:
            plans.append(best_plan(held, size, geometry, grid=asked.grid))
            show(len(plans), len(points))
    return OptimumResult(tuple(plans), geometry.name, opened.notes)
