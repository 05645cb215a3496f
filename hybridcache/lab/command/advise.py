"""``hybridcache advise``: the configuration to use for a trace and a memory size."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from hybridcache.lab.command.shared import add_tiers, opened, share, split, tiers_asked

if TYPE_CHECKING:
    from hybridcache.lab.command.shared import Commands


def add_advise(commands: Commands) -> None:
    """Add the command's parser."""
    from hybridcache.lab.advise import DEFAULT_POLICIES, SERVABLE_PRECISIONS, TUNE_SHARE

    parser = commands.add_parser(
        "advise", help="the policy, placement, precision and split to use for a trace and a size"
    )
    add = parser.add_argument
    share(parser, "--trace", "--model", "--servers", "--times", "--processes", "--skip-bad")
    add("--gib", type=float, required=True, help="memory for KV and checkpoints together")
    add(
        "--policy",
        default=",".join(DEFAULT_POLICIES),
        help="eviction policies to choose among, commas between (default %(default)s)",
    )
    add(
        "--checkpoints",
        action="append",
        help="placement to choose among; repeat for several (default: six of the engine's)",
    )
    add(
        "--state-dtypes",
        default=",".join(SERVABLE_PRECISIONS),
        help="precisions of states to choose among, commas between (default %(default)s, which the "
        "engine supports)",
    )
    add(
        "--tune-share",
        type=float,
        default=TUNE_SHARE,
        help="share of the requests that the choice is made on; the others check the forecast "
        "(default %(default)s; 1: no check)",
    )
    add_tiers(parser)
    add("--json", action="store_true", help="JSON lines instead of a table")
    parser.set_defaults(run=_advise)


def _advise(options: argparse.Namespace) -> int:
    from hybridcache.lab.advise import PLACEMENTS, advise

    advice = advise(
        opened(options.trace, options),
        model=options.model,
        gib=options.gib,
        policy=split(options.policy),
        checkpoints=options.checkpoints or PLACEMENTS,
        state_dtypes=split(options.state_dtypes),
        tune_share=options.tune_share,
        servers=options.servers,
        times=options.times,
        processes=options.processes,
        **tiers_asked(options),
    )
    print(json.dumps(advice.as_record()) if options.json else advice.text())
    return 0
