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

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from hybridcache.command.extras import install_command
from hybridcache.config import GRID
from hybridcache.geometry.exchange import DISK_BYTES_PER_S, PCIE_BYTES_PER_S
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.times import MeasuredTimes, PrefillTimes, Roofline, describe_times
from hybridcache.geometry.units import GIB
from hybridcache.lab.baselines import HOST_TIERS
from hybridcache.lab.defaults import GIB_SPEC, MODEL
from hybridcache.lab.infinite import InfiniteCache
from hybridcache.lab.optimum.solve import Optimum, best_plan
from hybridcache.lab.optimum.trie import Placement
from hybridcache.lab.progress import Progress, shown_progress
from hybridcache.lab.simulation.own_code import spec_of
from hybridcache.lab.simulation.result import RunResult, SweepRuns
from hybridcache.lab.simulation.serving import Serving
from hybridcache.lab.simulation.sizes import budget_bytes, sizes_for, tier_bytes
from hybridcache.lab.simulation.sweep import Job, identity_of, run_sweep
from hybridcache.lab.simulation.target import RunConfig, check_words
from hybridcache.lab.trace import Trace
from hybridcache.lab.traces import open_trace
from hybridcache.policies.registry import (
    DEFAULT_EVICTION,
    DEFAULT_PLACEMENT,
    EVICTION,
    AdmissionSpec,
    EvictionSpec,
    PlacementSpec,
)
from hybridcache.policies.user import OwnPolicy, own_policy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hybridcache.lab.figures import FigureStyle, Plot


BUILTIN = "builtin"
"""Name of the built-in model of the engine. The presets of the cache do not include it."""

ALL = "all"
"""Name of all built-in eviction policies together."""
Words = str | Sequence[str]
Policy = EvictionSpec | PlacementSpec
Policies = Policy | Sequence[Policy]
AnyPolicy = Policy | AdmissionSpec
Sizes = str | float | Sequence[float]


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

    def table(self, metric: str = "hit") -> str:
        """Return a table of one of ``hybridcache.lab.report.METRICS``: a row per competitor, a
        column per size."""
        from hybridcache.lab.report import sweep_table

        return sweep_table(self, metric)

    def verdict(self) -> str:
        """Return one sentence: the policies with the most hits, and the command that serves with
        them. Empty if there is nothing to choose from."""
        from hybridcache.lab.report import verdict

        return verdict(self)

    def write_jsonl(self, path: str | Path) -> None:
        """Write every run as one JSON line."""
        from hybridcache.lab.report import write_runs

        write_runs(self, Path(path))

    @property
    def plot(self) -> Plot:
        """Plots on your own matplotlib axes, in your own style: ``plot.capacity(ax=None)`` and
        ``plot.losses(ax=None)``."""
        from hybridcache.lab.figures import Plot

        return Plot(self)

    def figure(
        self,
        path: str | Path | None = None,
        metric: Words | None = None,
        style: FigureStyle | None = None,
    ) -> Figure:
        """Draw metrics over the sizes, a panel each; by default the token hit rate, and its share
        of the best plan if the result has plans. The figure is also written to ``path`` (PNG,
        SVG or PDF), if there is one. ``style`` has the size, fonts and names."""
        from hybridcache.lab.figures import sweep_figure

        return sweep_figure([self], path, metric, style)

    def bins_figure(
        self,
        path: str | Path | None = None,
        gib: float | None = None,
        style: FigureStyle | None = None,
    ) -> Figure:
        """Draw the token hit rate by prompt length and by turn, at the size nearest to ``gib`` (the
        middle one if None)."""
        from hybridcache.lab.figures import bins_figure

        return bins_figure([self], path, gib, style)

    def losses_figure(
        self, path: str | Path | None = None, style: FigureStyle | None = None
    ) -> Figure:
        """Draw the prompt tokens by loss cause over the sizes, a panel per competitor."""
        from hybridcache.lab.figures import losses_figure

        return losses_figure([self], path, style)


@dataclass(frozen=True, slots=True, repr=False)
class OptimumResult(Sequence[Optimum]):
    """Best plans for one trace, by size: a sequence of ``Optimum``."""

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
            f"{100 * plan.reached:.1f} % at {plan.capacity_bytes / GIB:.4g} GiB"
            for plan in self.plans
        )
        return f"{type(self).__name__}({first.trace}: {rates})"

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return a flat dictionary per size: ``gib``, ``reached`` and ``bound`` as token hit rates.
        O(sizes)."""
        return [{"gib": plan.capacity_bytes / GIB} | plan.record() for plan in self.plans]

    def table(self) -> str:
        """Return a table: plan, bound and gap, a row per size."""
        from hybridcache.lab.report import optimum_table

        return optimum_table(self.plans)

    def figure(self, path: str | Path | None = None, style: FigureStyle | None = None) -> Figure:
        """Draw plan and bound over the sizes. The figure is also written to ``path`` (PNG, SVG or
        PDF), if there is one."""
        from hybridcache.lab.figures import optimum_figure

        return optimum_figure(self.plans, path, style)


@dataclass(frozen=True, slots=True)
class Sweep:
    """Competitors, memory and machine of a sweep; ``simulate`` documents these arguments."""

    model: str | ModelGeometry = MODEL
    gib: Sizes = GIB_SPEC
    policy: Policies = DEFAULT_EVICTION
    checkpoints: Policies = DEFAULT_PLACEMENT
    baseline: Words = ()
    priority_classes: bool = True
    memory: str = "arena"
    kv_share: float | None = None
    host_gib: float = 0.0
    disk_gib: float = 0.0
    host_gb_s: float = PCIE_BYTES_PER_S / 1e9
    disk_gb_s: float = DISK_BYTES_PER_S / 1e9
    state_dtype: str | None = None
    checkpoint_dtype: str = "auto"
    page_size: int = 1
    grid: int = GRID
    servers: int = 1
    max_running: int | None = None
    times: str | PrefillTimes | None = None

    def geometry(self) -> ModelGeometry:
        """Return the model, with states of the precision asked for."""
        found = self.model
        if isinstance(found, str):
            found = load_model(found, checkpoint_dtype=self.checkpoint_dtype)
        if found.num_linear_layers and self.state_dtype is not None:
            return found.with_state_dtype(self.state_dtype)
        return found

    def serving(self, geometry: ModelGeometry) -> Serving:
        """Return the machine around the caches."""
        times = MeasuredTimes.load(self.times) if isinstance(self.times, str) else self.times
        return Serving(times or Roofline.fitting(geometry), self.servers, self.max_running)

    def competitors(self, geometry: ModelGeometry) -> list[RunConfig]:
        """Return one config each, without a size: every policy with every placement, then every
        peer.

        Raises ValueError for an invalid name, if there is no competitor, and if two have the same
        label."""
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
            for policy in named_policies(self.policy)
            for placement in named_policies(self.checkpoints)
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


def load_model(name: str, **dtypes: str) -> ModelGeometry:
    """Return the model ``name``: see ``ModelGeometry.load``, and the engine's ``builtin``.

    Raises the errors of ``ModelGeometry.load``; ValueError if the engine is not installed.
    """
    if name == BUILTIN and not Path(name).exists():
        engine = find_spec("engine")
        if engine is None or engine.origin is None:
            raise ValueError(
                f"model {name} is part of the engine, which is not installed: "
                f"{install_command('engine')}"
            )
        name = str(Path(engine.origin).parent / "models" / BUILTIN)
    return ModelGeometry.load(name, **dtypes)


def simulate(
    trace: str | Trace,
    *,
    model: str | ModelGeometry = MODEL,
    gib: Sizes = GIB_SPEC,
    policy: Policies = DEFAULT_EVICTION,
    checkpoints: Policies = DEFAULT_PLACEMENT,
    baseline: Words = (),
    priority_classes: bool = True,
    bound: bool = True,
    optimum: bool = False,
    memory: str = "arena",
    kv_share: float | None = None,
    host_gib: float = 0.0,
    disk_gib: float = 0.0,
    host_gb_s: float = PCIE_BYTES_PER_S / 1e9,
    disk_gb_s: float = DISK_BYTES_PER_S / 1e9,
    state_dtype: str | None = None,
    checkpoint_dtype: str = "auto",
    page_size: int = 1,
    grid: int = GRID,
    servers: int = 1,
    max_running: int | None = None,
    times: str | PrefillTimes | None = None,
    processes: int = 1,
    ray: str | None = None,
    resume_from: str | Path | None = None,
    progress: Progress = None,
) -> SimulationResult:
    """Run every policy with every placement, and every baseline, at every size.

    - ``trace``: a trace, or a specification that ``open_trace`` reads.
    - ``model``: name of a preset, path of a config.json, ``builtin`` (the engine's own model), or a
      geometry.
    - ``gib``: memory for KV and states together; ``low:high:points``, a list, or one number. With
      ``%`` (``1%:100%``) they are shares of the working set: KV of every distinct token, and a
      state a request.
    - ``policy``: eviction policies: names, ``module:Class(alpha=2)``, classes, functions that make
      a policy, or policies. ``all``: every built-in one.
    - ``checkpoints``: one placement (names with commas, or your own), or a list of them.
    - ``baseline``: names of rebuilt peers.
    - ``priority_classes``: evict unreachable KV and superseded checkpoints before all else; False
      leaves the order to each policy.
    - ``bound``: also compute the reuse of an infinite token-granular cache.
    - ``optimum``: also compute a plan with hindsight at each size, for the device's memory alone.
    - ``memory``: ``arena``, as in the engine; ``budget``, an ideal that only counts bytes; or
      ``pools``, two, of which ``kv_share`` is for KV. Peers have their own.
    - ``host_gib``, ``disk_gib``: tiers below the device, read at ``host_gb_s`` and ``disk_gb_s``
      GB/s. Peers that offload to the host (``baselines.HOST_TIERS``) get the same host memory.
    - ``state_dtype``, ``checkpoint_dtype``: precision of states, and of checkpoints alone; the
      model's own by default.
    - ``page_size``, ``grid``: tokens of a KV page; checkpoints lie at multiples of ``grid`` tokens.
    - ``servers``, ``max_running``: prefills at the same time; requests served at the same time
      (None replays them in turn).
    - ``times``: file or model of prefill times; by default a roofline of as many H100 as hold the
      model.
    - ``processes``, ``ray``: number of processes, or the address of a Ray cluster; neither changes
      a result.
    - ``resume_from``: file of JSON lines; its runs are read, new ones are appended.
    - ``progress``: function of (requests done, requests of all runs); False for none. By default a
      bar in terminals and notebooks.

    O(requests) per run. Raises ValueError or OSError, each with one sentence, for
    invalid arguments and unreadable files.
    """
    opened = open_trace(trace) if isinstance(trace, str) else trace
    sweep = Sweep(
        model=model,
        gib=gib,
        policy=policy,
        checkpoints=checkpoints,
        baseline=baseline,
        priority_classes=priority_classes,
        memory=memory,
        kv_share=kv_share,
        host_gib=host_gib,
        disk_gib=disk_gib,
        host_gb_s=host_gb_s,
        disk_gb_s=disk_gb_s,
        state_dtype=state_dtype,
        checkpoint_dtype=checkpoint_dtype,
        page_size=page_size,
        grid=grid,
        servers=servers,
        max_running=max_running,
        times=times,
    )
    if optimum and (host_gib or disk_gib):
        raise ValueError(
            "optimum plans the device's memory alone: leave it out, or host_gib and disk_gib."
        )
    geometry = sweep.geometry()
    serving = sweep.serving(geometry)
    competitors = sweep.competitors(geometry)
    points = sizes_for(gib, opened, geometry)
    jobs = [
        Job(replace(config, budget_bytes=budget_bytes(size)), serving)
        for config in competitors
        for size in points
    ]
    kept = Path(resume_from) if resume_from else None
    with shown_progress(progress, "requests", opened.name) as show:
        runs = run_sweep(
            opened, jobs, processes=processes, ray=ray, resume_from=kept, progress=show
        )
    is_known = isinstance(serving.times, Roofline | MeasuredTimes)
    result = SimulationResult(
        opened.name,
        geometry,
        tuple(runs),
        None,
        times=describe_times(serving.times) if is_known else "",
        counted_by=opened.counted_by,
    )
    if bound:
        result = _with_bound(result, opened)
    if optimum:
        result = _with_optimum(result, opened, points, grid)
    if kept and (bound or optimum):
        identity = identity_of(opened)
        _complete(kept, [job.key(identity) for job in jobs], result.runs)
    return result


def optimum(
    trace: str | Trace,
    *,
    model: str | ModelGeometry = MODEL,
    gib: Sizes = GIB_SPEC,
    placement: Placement = "shared",
    state_dtype: str | None = None,
    checkpoint_dtype: str = "auto",
    grid: int = GRID,
    counts_running: bool = False,
    progress: Progress = None,
) -> OptimumResult:
    """Compute a plan with hindsight at every size, and the bound of an infinite cache.

    Arguments that ``simulate`` has too mean the same. ``placement``: positions of checkpoints,
    ``shared`` by several requests or at ``every`` grid point. ``counts_running``: KV and state of
    the running request take memory too, as in every cache. Raises the errors of ``simulate``.
    """
    opened = (open_trace(trace) if isinstance(trace, str) else trace).kept()
    sweep = Sweep(model=model, state_dtype=state_dtype, checkpoint_dtype=checkpoint_dtype)
    if placement not in get_args(Placement):
        raise ValueError(
            f"placement must be {' or '.join(get_args(Placement))} (got {placement!r})."
        )
    geometry = sweep.geometry()
    points = sizes_for(gib, opened, geometry)
    plans = []
    with shown_progress(progress, "sizes", opened.name) as show:
        for done, size in enumerate(points):
            show(done, len(points))
            plans.append(
                best_plan(
                    opened,
                    capacity_bytes=budget_bytes(size),
                    kv_bytes_per_token=geometry.kv_bytes_per_token,
                    state_bytes=geometry.state_bytes,
                    grid=grid,
                    placement=placement,
                    counts_running=counts_running,
                )
            )
        show(len(points), len(points))
    return OptimumResult(tuple(plans))


def _with_bound(result: SimulationResult, trace: Trace) -> SimulationResult:
    """Add the reuse of an infinite token-granular cache. O(tokens)."""
    cache = InfiniteCache()
    tokens = sum(cache.ideal_tokens(request, trace.unit) for request in trace)
    runs = tuple(replace(run, bound_tokens=tokens) for run in result.runs)
    return replace(result, runs=runs, bound_rate=tokens / runs[0].prompt_tokens)


def _with_optimum(
    result: SimulationResult, trace: Trace, points: Sequence[float], grid: int
) -> SimulationResult:
    """Add a plan with hindsight at each size."""
    geometry = result.geometry
    best = {
        budget_bytes(size) / GIB: best_plan(
            trace,
            capacity_bytes=budget_bytes(size),
            kv_bytes_per_token=geometry.kv_bytes_per_token,
            state_bytes=geometry.state_bytes,
            grid=grid,
        )
        for size in points
    }
    runs = tuple(
        replace(run, optimum_tokens=int(best[run.gib or 0.0].cached_tokens.sum()))
        for run in result.runs
    )
    return replace(result, runs=runs)


def _complete(path: Path, keys: Sequence[str], runs: Sequence[RunResult]) -> None:
    """Write the yardsticks into the lines of ``path``: these were written run by run, before bound
    and optimum were known."""
    known = {key: run.as_record() for key, run in zip(keys, runs, strict=True)}
    whole = path.with_name(path.name + ".new")
    with path.open(encoding="utf-8") as lines, whole.open("w", encoding="utf-8") as file:
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # half a line, left by a process that was killed
            file.write(json.dumps(record | known.get(record.get("key"), {})) + "\n")
    whole.replace(path)


def named_policies(given: AnyPolicy | Sequence[AnyPolicy]) -> tuple[str | OwnPolicy, ...]:
    """Return each policy as its name in specifications, or wrapped if it has none. ``all`` stands
    for every built-in eviction policy."""
    if given == ALL or given == (ALL,):
        return tuple(sorted(EVICTION))
    several = given if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
    return tuple(map(_policy, several))


def _policy(one: AnyPolicy) -> str | OwnPolicy:
    """Replace a class by its name, if it has one, so that other processes find it."""
    if isinstance(one, str | OwnPolicy):
        return one
    return (isinstance(one, type) and spec_of(one)) or own_policy(one)
