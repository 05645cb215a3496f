"""``hybridcache leaderboard``: your policy against every built-in one."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridcache.lab.command.shared import Once, share

if TYPE_CHECKING:
    from hybridcache.lab.command.shared import Commands


def add_leaderboard(commands: Commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "leaderboard", help="your policy against every built-in one on the evaluation split"
    )
    parser.register("action", None, Once)
    add = parser.add_argument
    add(
        "policies",
        nargs="*",
        metavar="POLICY",
        help="module:Class of an eviction policy, or eviction@placement",
    )
    add("--built-in", metavar="NAMES", help="built-in evictions, commas between (default: all)")
    add("--seeds", type=int, metavar="N", help="only the first N seeds (default: all ten)")
    add("--split", type=Path, metavar="FILE", help="another split (default: the packaged one)")
    share(parser, "--processes")
    add("--output", type=Path, help="JSON lines of finished runs; a repeated command continues")
    add("--json", action="store_true", help="JSON lines, one per policy, instead of a table")
    parser.set_defaults(run=_leaderboard, goes_on=True)


def _leaderboard(options: argparse.Namespace) -> int:
    from hybridcache.lab.leaderboard import BUILT_IN, Split, leaderboard
    from hybridcache.policies.registry import split_specs

    named = options.built_in
    built_in = BUILT_IN if named is None else tuple(filter(None, split_specs(named)))
    board = leaderboard(
        options.policies,
        Split.load(options.split),
        built_in=built_in,
        seeds=options.seeds,
        processes=options.processes,
        resume_from=options.output,
    )
    if options.json:
        for row in board.rows():
            print(json.dumps(_finite(asdict(row))))
        for name, words in board.failures.items():
            print(json.dumps({"name": name, "failed": words}))
    else:
        print(board.table())
    return 1 if board.failures else 0


def _finite(value: Any) -> Any:
    """Return ``value`` with None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(own) for own in value]
    return None if isinstance(value, float) and math.isnan(value) else value
