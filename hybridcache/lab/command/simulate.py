"""``hybridcache simulate``: replay traces through caches of many sizes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridcache.lab.command.shared import (
    FIGURE_LOOK,
    TRACE_HELP,
    add_figure_style,
    add_tiers,
    check_figure,
    figure_style,
    opened,
    refuse,
    share,
    split,
    tiers_asked,
)
from hybridcache.lab.defaults import GIB_SPEC

if TYPE_CHECKING:
    from hybridcache.lab.command.shared import Commands
    from hybridcache.lab.simulation.simulate import SimulationResult


def add_simulate(commands: Commands) -> None:
    """Add the command's parser."""
    from hybridcache.lab.baselines import BASELINES
    from hybridcache.lab.report import METRICS
    from hybridcache.lab.simulation.target import MEMORIES
    from hybridcache.policies.registry import (
        DEFAULT_EVICTION,
        DEFAULT_PLACEMENT,
        eviction_names,
        placement_names,
    )

    parser = commands.add_parser("simulate", help="replay a trace through caches of many sizes")
    group = parser.add_argument_group("most used")
    add = group.add_argument
    add("--trace", required=True, action="append", help=TRACE_HELP + "; may be repeated")
    share(group, "--model", "--gib")
    add(
        "--policy",
        default=DEFAULT_EVICTION,
        help=f"eviction policies, joined by commas (default {DEFAULT_EVICTION}): "
        f"{', '.join(eviction_names())}, all, module:Class",
    )
    add(
        "--checkpoints",
        action="append",
        help=f"placements, joined by commas; repeat to compare (default {DEFAULT_PLACEMENT}): "
        f"{', '.join(placement_names())}, none, module:Class",
    )
    add("--figure", type=Path, help="PNG, SVG or PDF to draw; losses and bins get files next to it")
    add("--output", type=Path, help="JSON lines, one per run; a repeated command continues")
    share(group, "--processes")
    group = parser.add_argument_group("results")
    add = group.add_argument
    add(
        "--baseline",
        default="",
        help=f"caches of other systems, rebuilt; joined by commas: {', '.join(BASELINES)}",
    )
    add(
        "--bound",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also simulate an infinite cache",
    )
    add(
        "--optimum",
        action="store_true",
        help="also compute a plan with hindsight at each size",
    )
    known = ", ".join(METRICS)
    add("--metric", default="hit", help=f"metrics of tables and figure, joined by commas: {known}")
    add("--losses", action="store_true", help="also print the tokens by loss cause")
    add(
        "--bins",
        action="store_true",
        help="also print hit rates by prompt length and by turn of the session",
    )
    share(group, "--skip-bad", "--ray")
    group = parser.add_argument_group("memory and machine")
    add = group.add_argument
    add(
        "--memory",
        choices=MEMORIES,
        default="arena",
        help="one arena for KV and states, as in the engine; an ideal budget of bytes; or two "
        "pools",
    )
    add("--kv-share", type=float, help="with --memory pools: share of the memory for KV, 0 to 1")
    share(group, "--state-dtype", "--checkpoint-dtype", "--grid")
    add("--page-size", type=int, default=1, help="tokens of a KV page")
    add(
        "--priority-classes",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="evict unreachable KV and superseded checkpoints first; otherwise each policy orders "
        "all items",
    )
    share(group, "--servers", "--times")
    add("--max-running", type=int, help="requests served at the same time (default: one by one)")
    add_tiers(parser.add_argument_group("host and disk tiers"))
    _add_closed_loop(parser.add_argument_group("closed loop"))
    _add_fleet(parser.add_argument_group("replicas"))
    add_figure_style(parser.add_argument_group("look of figures"))
    parser.set_defaults(run=_simulate, goes_on=True)


CLOSED_LOOP: dict[str, dict[str, Any]] = {
    "--rate": {
        "help": "sessions a second, low:high:points (log-spaced) or a,b,c (default 0.5:4:5)"
    },
    "--admission": {
        "help": "policies that admit waiting requests, joined by commas (default oldest,sessions)"
    },
    "--token-budget": {"type": int, "help": "tokens computed in a step (default 8192)"},
    "--ttft-limit": {
        "type": float,
        "help": "seconds to the first token up to which an answer counts as goodput (default 2)",
    },
    "--seeds": {"type": int, "help": "runs with other arrivals, averaged (default 1)"},
    "--tells-ends": {"action": "store_true", "help": "clients say when a session has ended"},
}
"""Options with ``--closed-loop`` only."""
CLOSED_LOOP_DEFAULTS = dict.fromkeys(CLOSED_LOOP) | {"--tells-ends": False}
SAME_IN_CLOSED_LOOP = (
    "model",
    "checkpoints",
    "rate",
    "seeds",
    "max_running",
    "token_budget",
    "tells_ends",
    "memory",
    "state_dtype",
    "page_size",
    "grid",
    "times",
    "processes",
    "ray",
)
"""Options that are arguments of ``closed_loop`` as they are."""
FLEET: dict[str, dict[str, Any]] = {
    "--load": {
        "type": float,
        "help": "share of the trace's time that computing all prompts without a cache would keep "
        "the replicas busy (default: given by the prefill times)",
    },
    "--event-delay": {
        "type": float,
        "help": "seconds until a change in a cache reaches a router (default 0)",
    },
    "--failures": {
        "type": int,
        "help": "replicas that fail, evenly over the trace, each replaced by an empty one after "
        "30 s (default 0)",
    },
}
"""Options of fleets, with ``--replicas`` only."""
ALONE = {
    "--baseline": "",
    "--optimum": False,
    "--losses": False,
    "--bins": False,
    "--metric": "hit",
    "--max-running": None,
    "--figure": None,
    **FIGURE_LOOK,
    "--servers": 1,
    "--bound": True,
    "--priority-classes": True,
    "--kv-share": None,
    "--checkpoint-dtype": "auto",
    "--host-gib": 0.0,
    "--disk-gib": 0.0,
    "--host-gb-s": None,
    "--disk-gb-s": None,
}
"""Options without a meaning for fleets, and their defaults."""


def _add_closed_loop(parser: argparse._ActionsContainer) -> None:
    from hybridcache.policies.registry import admission_names

    parser.add_argument(
        "--closed-loop",
        action="store_true",
        help="sessions arrive at a rate, and each request follows the answer and the pause before "
        "it; requests are scheduled as in the engine",
    )
    for flag, facts in CLOSED_LOOP.items():
        known = f": {', '.join(admission_names())}, module:Class" if flag == "--admission" else ""
        parser.add_argument(flag, **facts | {"help": facts["help"] + known})


def _simulate_closed_loop(options: argparse.Namespace) -> int:
    """Serve every trace at every rate with every admission policy, and print their tables."""
    from hybridcache.lab.figures import closed_loop_figure
    from hybridcache.lab.simulation.closed_loop import closed_loop
    from hybridcache.lab.simulation.result import ClosedLoopRun

    understood = {"--max-running", "--figure", *FIGURE_LOOK}
    others = {flag: default for flag, default in ALONE.items() if flag not in understood}
    refuse(
        options, others | {"--replicas": None}, "has no meaning with --closed-loop: leave it out"
    )
    style = check_figure(options)
    asked: dict[str, Any] = {
        "gib": None if options.gib == GIB_SPEC else options.gib,
        "policy": split(options.policy),
        "admission": split(options.admission) if options.admission else None,
        "ttft_limit_s": options.ttft_limit,
    } | {name: getattr(options, name) for name in SAME_IN_CLOSED_LOOP}
    asked = {name: value for name, value in asked.items() if value is not None}
    runs: list[ClosedLoopRun] = []
    for spec in options.trace:
        result = closed_loop(opened(spec, options), resume_from=options.output, **asked)
        runs += result.runs
        if options.figure:
            closed_loop_figure(runs, options.figure, style=style)
        print(result.table(), end="\n\n")
    if options.figure:
        print(f"figure: {options.figure}")
    return 0


def _simulate(options: argparse.Namespace) -> int:
    if options.replicas is None:
        fleet = dict.fromkeys(("--router", *FLEET))
        refuse(options, fleet, "is about several replicas: say how many with --replicas")
    if options.closed_loop:
        return _simulate_closed_loop(options)
    reason = "is about sessions that wait for answers: add --closed-loop"
    refuse(options, CLOSED_LOOP_DEFAULTS, reason)
    if options.replicas is not None:
        return _simulate_fleets(options)
    from hybridcache.lab.report import bins_table, find_metric, losses_table
    from hybridcache.lab.simulation.simulate import simulate

    metrics = options.metric.split(",")
    for word in metrics:
        find_metric(word)
    known = options.optimum or (options.output and options.output.exists())
    if "optimum" in metrics and not known:
        raise ValueError("--metric optimum needs a plan: add --optimum")
    check_figure(options)
    results: list[SimulationResult] = []
    drawn: list[Path] = []
    for spec in options.trace:
        trace = opened(spec, options)
        result = simulate(
            trace,
            **_asked(options),
            bound=options.bound,
            optimum=options.optimum,
            processes=options.processes,
            ray=options.ray,
            resume_from=options.output,
        )
        results.append(result)
        if options.figure:  # before anything is printed: a pipe that reads it may close early
            drawn = _draw(results, options, metrics)
        for word in metrics:
            print(result.table(word), end="\n\n")
        if options.losses:
            print(losses_table(result.runs), end="\n\n")
        if options.bins:
            print(bins_table(result.runs, "length"), end="\n\n")
            print(bins_table(result.runs, "turn"), end="\n\n")
        if verdict := result.verdict():
            print(verdict, end="\n\n")
    for path in drawn:
        print(f"figure: {path}")
    return 0


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of ``simulate`` for competitors, memory and machine."""
    from hybridcache.policies.registry import DEFAULT_PLACEMENT

    as_they_are = [
        "model",
        "gib",
        "priority_classes",
        "memory",
        "kv_share",
        "state_dtype",
        "checkpoint_dtype",
        "page_size",
        "grid",
        "servers",
        "max_running",
        "times",
    ]
    return {name: getattr(options, name) for name in as_they_are} | {
        **tiers_asked(options),
        "policy": split(options.policy),
        "checkpoints": options.checkpoints or DEFAULT_PLACEMENT,
        "baseline": split(options.baseline),
    }


def _draw(
    results: Sequence[SimulationResult], options: argparse.Namespace, metrics: Sequence[str]
) -> list[Path]:
    """Draw the figures that were asked for, of the traces so far."""
    from hybridcache.lab.figures import bins_figure, losses_figure, sweep_figure

    drawn: list[Path] = [options.figure]
    style = figure_style(options)
    sweep_figure(results, options.figure, metrics, style=style)
    if options.losses:
        drawn.append(_beside(options.figure, "losses"))
        losses_figure(results, drawn[-1], style=style)
    if options.bins:
        drawn.append(_beside(options.figure, "bins"))
        bins_figure(results, drawn[-1], style=style)
    return drawn


def _beside(path: Path, word: str) -> Path:
    return path.with_name(f"{path.stem}-{word}{path.suffix}")


# --- Fleets -------------------------------------------------------------------------------------


def _add_fleet(parser: argparse._ActionsContainer) -> None:
    """Add the options of fleets."""
    from hybridcache.routing.registry import ROUTERS

    words = ", ".join((*ROUTERS, "oracle"))
    parser.add_argument(
        "--replicas",
        type=int,
        help="number of caches behind a router, each of --gib; prints other tables",
    )
    parser.add_argument(
        "--router",
        help=f"with --replicas, commas between (default checkpoint): {words}, module:Class",
    )
    for flag, facts in FLEET.items():
        parser.add_argument(flag, **facts)


def _simulate_fleets(options: argparse.Namespace) -> int:
    """Run every router at every size, and print their tables. Raises ValueError for an option that
    has no meaning with fleets."""
    from hybridcache.lab.progress import shown_progress
    from hybridcache.lab.replicas.fleet import FleetConfig
    from hybridcache.lab.replicas.result import fleet_table
    from hybridcache.lab.replicas.runs import fleet_jobs, run_fleets
    from hybridcache.lab.simulation.grid import Place
    from hybridcache.lab.simulation.simulate import Sweep
    from hybridcache.lab.simulation.sizes import sizes_for
    from hybridcache.policies.registry import DEFAULT_PLACEMENT

    refuse(options, ALONE, "has no meaning with --replicas: leave it out")
    sweep = Sweep(
        options.model,
        policy=options.policy.split(","),
        checkpoints=options.checkpoints or DEFAULT_PLACEMENT,
        memory=options.memory,
        state_dtype=options.state_dtype,
        page_size=options.page_size,
        grid=options.grid,
        times=options.times,
    )
    geometry = sweep.geometry()
    fleet = FleetConfig(
        options.replicas,
        load=options.load,
        delay_s=options.event_delay or 0.0,
        failures=options.failures or 0,
    )
    routers = (options.router or "checkpoint").split(",")
    times = sweep.serving(geometry).times
    for spec in options.trace:
        trace = opened(spec, options)
        for config in sweep.competitors(geometry):
            points = sizes_for(options.gib, trace, geometry)
            jobs = fleet_jobs(config, fleet, times, routers, points)
            with shown_progress(None, "runs", spec) as show:
                results = run_fleets(
                    trace,
                    jobs,
                    place=Place(options.processes, options.ray),
                    resume_from=options.output,
                    progress=show,
                )
            print(fleet_table(results), end="\n\n")
    return 0
