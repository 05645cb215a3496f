"""``hybridcache optimum``: a plan that knows all requests, and the bound."""

from __future__ import annotations

import argparse
import json
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
    add("--json", action="store_true", help="JSON lines, one per size, instead of a table")
    add("--figure", type=Path, help="PNG, SVG or PDF to draw: plan and bound")
    parser.set_defaults(run=_optimum)


def _optimum(options: argparse.Namespace) -> int:
    from hybridcache.lab.figures import optimum_figure
    from hybridcache.lab.scenario import Scenario
    from hybridcache.lab.simulation.simulate import optimum

    check_figure(options)
    scenario = Scenario(opened(options.trace, options), **given_settings(options))
    found = optimum(scenario, counts_running=options.counts_running)
    if options.figure:
        optimum_figure(found.plans, options.figure)
    if options.json:
        print("\n".join(json.dumps(plan) for plan in found.to_dicts()))
    else:
        print(found.table() + f"\nfigure: {options.figure}" * bool(options.figure))
    return 0
