"""``hybridcache simulate --replicas``: fleets on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from hybridcache.lab.trace import Trace

FLAGS: dict[str, dict[str, Any]] = {
    "--load": {
        "type": float,
        "help": "replicas so fast that all prompts computed cold would keep them busy for this "
        "share of the trace's time (default: as fast as the prefill times say)",
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
"""With ``--replicas`` only."""
ALONE = {
    "--baseline": "",
    "--optimum": None,
    "--losses": False,
    "--bins": False,
    "--metric": "hit",
    "--max-running": None,
    "--figure": None,
    "--figure-size": None,
    "--figure-font": "",
    "--figure-font-size": 9.0,
    "--figure-labels": "legend",
    "--servers": 1,
    "--bound": True,
    "--priority-classes": True,
    "--kv-share": None,
    "--checkpoint-dtype": "auto",
    "--host-gib": 0.0,
    "--disk-gib": 0.0,
    "--host-gb-s": None,
    "--disk-gb-s": None,
    "--page": None,
}
"""Without ``--replicas`` only, and their defaults."""
CLOSED_LOOP = {
    "--closed-loop": False,
    "--rate": None,
    "--admission": None,
    "--max-share": None,
    "--token-budget": None,
    "--ttft-limit": None,
    "--seeds": None,
    "--tells-ends": False,
}
"""The same, for closed-loop runs."""


def add_fleet(parser: argparse.ArgumentParser) -> None:
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
    for flag, facts in FLAGS.items():
        parser.add_argument(flag, **facts)


def refuse_without_replicas(options: argparse.Namespace) -> None:
    """ValueError where a flag of fleets stands alone."""
    for flag in ("--router", *FLAGS):
        if _value(options, flag) is not None:
            raise ValueError(f"{flag} is about several replicas: say how many with --replicas")


def _value(options: argparse.Namespace, flag: str) -> Any:
    return getattr(options, flag.removeprefix("--").replace("-", "_"))


def simulate_fleets(options: argparse.Namespace, open_trace: Callable[[str], Trace]) -> int:
    """Run every router at every size, and print their tables. ValueError: a flag that has no
    meaning here."""
    from hybridcache.lab.progress import shown_progress
    from hybridcache.lab.replicas.fleet import FleetConfig
    from hybridcache.lab.replicas.report import fleet_table
    from hybridcache.lab.replicas.runs import fleet_jobs, run_fleets
    from hybridcache.lab.simulation.grid import Place
    from hybridcache.lab.simulation.simulate import Sweep
    from hybridcache.lab.simulation.sizes import sizes
    from hybridcache.policies.registry import DEFAULT_PLACEMENT

    for flag, default in (ALONE | CLOSED_LOOP).items():
        if _value(options, flag) != default:
            said = flag.replace("--", "--no-") if default is True else flag
            raise ValueError(f"{said} has no meaning with --replicas: leave it out")
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
    points = sizes(options.gib)
    times = sweep.serving(geometry).times
    for spec in options.trace:
        trace = open_trace(spec)
        for config in sweep.competitors(geometry):
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
