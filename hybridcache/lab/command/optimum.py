"""``hybridcache optimum``: a plan that knows all requests, and the bound."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hybridcache.lab.command.shared import (
    TRACE_HELP,
    Once,
    add_settings,
    check_figure,
    given_settings,
    opened,
    share,
)

if TYPE_CHECKING:
    from hybridcache.lab.command.shared import Commands


def add_optimum(commands: Commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "optimum", help="a plan that knows all requests, and the bound of an infinite cache"
    )
    parser.register("action", None, Once)
    add = parser.add_argument
    add("--trace", type=str, required=True, help=TRACE_HELP)
    share(parser, "--skip-bad")
    add_settings(parser, "model", "gib", "state_dtype", "grid")
    add(
        "--counts-running",
        action="store_true",
        help="KV and state of the running request take memory too, as in every cache",
    )
    add("--output", type=Path, help="JSON lines, one per size; sizes that the file has are kept")
    add("--figure", type=Path, help="PNG, SVG or PDF to draw: plan and bound")
    parser.set_defaults(run=_optimum)


def _optimum(options: argparse.Namespace) -> int:
    from hybridcache.lab.figures import optimum_figure
    from hybridcache.lab.optimum.solve import Optimum
    from hybridcache.lab.scenario import Scenario
    from hybridcache.lab.simulation.grid import (
        appended,
        check_results_file,
        identity_of,
        json_line,
        line_head,
        records_of,
    )
    from hybridcache.lab.simulation.simulate import optimum

    check_figure(options)
    trace = opened(options.trace, options)
    scenario = Scenario(trace, **given_settings(options))
    geometry = scenario.geometry()
    model = geometry.name
    if options.output:
        check_results_file(options.output, Optimum, trace)
        with appended(options.output):
            pass  # Say now that it cannot be written.
    found = optimum(scenario, counts_running=options.counts_running)
    if options.output:
        identity = identity_of(trace) + bytes([options.counts_running])
        config = {
            "trace": trace.full_name,
            "model": model,
            "state_dtype": geometry.state_dtype,
            "grid": scenario.grid,
            "counts_running": options.counts_running,
        }
        with appended(options.output) as file:
            known = {one.get("key") for one in records_of(options.output)}
            for best in found:
                key = replace(scenario, gib=best.gib).key(identity)
                if key not in known:
                    record = line_head(key, Optimum) | {"config": config | {"gib": best.gib}}
                    record |= best.record() | {"model": model}
                    file.write(json_line(record))
    print(found.table())
    if options.figure:
        optimum_figure(found.plans, options.figure)
        print(f"figure: {options.figure}")
    return 0
