"""``hybridcache optimum``: the best that any policy could have done."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hybridcache.lab.command.shared import add_tiers, check_figure, opened, share, tiers_asked
from hybridcache.lab.defaults import LIMIT_S, RELATIVE_GAP

if TYPE_CHECKING:
    from hybridcache.lab.command.shared import Commands


def add_optimum(commands: Commands) -> None:
    """The command's parser."""
    parser = commands.add_parser("optimum", help="the best that any policy could have done")
    add = parser.add_argument
    share(parser, "--trace", "--model", "--gib", "--state-dtype", "--grid", "--skip-bad")
    add(
        "--method",
        choices=("greedy", "lp", "milp"),
        help="greedy for long traces (default: milp; lp with a tier below the device)",
    )
    add(
        "--placement",
        choices=("shared", "every"),
        default="shared",
        help="where checkpoints may sit",
    )
    add("--gap", type=float, default=RELATIVE_GAP, help="stop when bound and plan are so close")
    add("--limit", type=float, default=LIMIT_S, help="seconds for one size")
    add_tiers(parser)
    add("--output", type=Path, help="JSON lines, one a size, with the price of memory over time")
    add("--figure", type=Path, help="PNG or SVG to draw: plan and bound, and that price")
    parser.set_defaults(run=_optimum)


def _optimum(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from hybridcache.geometry.model import ModelGeometry
    from hybridcache.lab.figures import optimum_figure
    from hybridcache.lab.optimum import lower_budgets, optimum
    from hybridcache.lab.report import optimum_table
    from hybridcache.lab.simulation.sizes import budget_bytes, sizes, tier_bytes

    check_figure(options.figure)
    geometry = ModelGeometry.load(options.model)
    if options.state_dtype:
        geometry = geometry.with_state_dtype(options.state_dtype)
    tiers = tiers_asked(options)
    lower = lower_budgets(
        geometry,
        (tier_bytes("host", tiers["host_gib"]), tiers["host_gb_s"] * 1e9),
        (tier_bytes("disk", tiers["disk_gib"]), tiers["disk_gb_s"] * 1e9),
    )
    trace = opened(options.trace, options).kept()
    found = []
    with tqdm(sizes(options.gib), unit=" sizes", disable=None, file=sys.stderr) as bar:
        for size in bar:
            best = optimum(
                trace,
                capacity_bytes=budget_bytes(size),
                kv_bytes_per_token=geometry.kv_bytes_per_token,
                state_bytes=geometry.state_bytes,
                grid=options.grid,
                method=options.method or ("lp" if lower else "milp"),
                placement=options.placement,
                relative_gap=options.gap,
                limit_s=options.limit,
                lower=lower,
                on_progress=bar.set_postfix_str,
            )
            found.append(best)
            if options.output:
                with options.output.open("a", encoding="utf-8") as file:
                    record = best.record(with_prices=True) | {"model": geometry.name}
                    file.write(json.dumps(record) + "\n")
    print(optimum_table(found))
    if options.figure:
        optimum_figure(found, options.figure)
        print(f"figure: {options.figure}")
    return 0
