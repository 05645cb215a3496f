"""``hybridcache optimum``: the best that any policy could have done."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from hybridcache.lab.command.shared import (
    add_figure_style,
    check_figure,
    opened,
    share,
)

if TYPE_CHECKING:
    from hybridcache.lab.command.shared import Commands


def add_optimum(commands: Commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser("optimum", help="the best that any policy could have done")
    add = parser.add_argument
    share(parser, "--trace", "--model", "--gib", "--state-dtype", "--grid", "--skip-bad")
    add(
        "--placement",
        choices=("shared", "every"),
        default="shared",
        help="where checkpoints may sit",
    )
    add(
        "--counts-running",
        action="store_true",
        help="KV and state of the running request take memory too, as in every cache",
    )
    add("--output", type=Path, help="JSON lines, one per size")
    add("--figure", type=Path, help="PNG, SVG or PDF to draw: plan and bound")
    add_figure_style(parser)
    parser.set_defaults(run=_optimum)


def _optimum(options: argparse.Namespace) -> int:
    from hybridcache.lab.figures import optimum_figure
    from hybridcache.lab.simulation.grid import check_results_file
    from hybridcache.lab.simulation.simulate import load_model, optimum

    style = check_figure(options)
    model = load_model(options.model).name
    trace = opened(options.trace, options)
    if options.output:
        check_results_file(options.output, trace)
        options.output.parent.mkdir(parents=True, exist_ok=True)
    found = optimum(
        trace,
        model=options.model,
        gib=options.gib,
        placement=options.placement,
        state_dtype=options.state_dtype,
        grid=options.grid,
        counts_running=options.counts_running,
    )
    if options.output:
        with options.output.open("a", encoding="utf-8") as file:
            for best in found:
                file.write(json.dumps(best.record() | {"model": model}) + "\n")
    print(found.table())
    if options.figure:
        optimum_figure(found.plans, options.figure, style)
        print(f"figure: {options.figure}")
    return 0
