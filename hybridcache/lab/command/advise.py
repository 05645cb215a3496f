"""``hybridcache advise``: what to use for a trace and a size."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from hybridcache.lab.command.shared import opened, share, split

if TYPE_CHECKING:
    from hybridcache.lab.command.shared import Commands


def add_advise(commands: Commands) -> None:
    """The command's parser."""
    from hybridcache.lab.advise import SERVABLE_PRECISIONS

    parser = commands.add_parser(
        "advise", help="the policy, placement, precision and split to use for a trace and a size"
    )
    add = parser.add_argument
    share(parser, "--trace", "--model", "--servers", "--times", "--processes", "--skip-bad")
    add("--gib", type=float, required=True, help="memory for KV and checkpoints together")
    add("--policy", help="eviction words to choose among, commas between")
    add(
        "--state-dtypes",
        default=",".join(SERVABLE_PRECISIONS),
        help="precisions of states to choose among, commas between (default %(default)s: what the "
        "engine serves)",
    )
    for word in ("host", "disk"):
        add(f"--{word}-gib", type=float, default=0.0, help=f"also what so much {word} is worth")
    add("--json", action="store_true", help="JSON lines instead of a table")
    parser.set_defaults(run=_advise)


def _advise(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from hybridcache.lab.advise import DEFAULT_POLICIES, advise

    trace = opened(options.trace, options)
    with tqdm(unit=" runs", disable=None, file=sys.stderr) as bar:
        advice = advise(
            trace,
            model=options.model,
            gib=options.gib,
            policies=split(options.policy) if options.policy else DEFAULT_POLICIES,
            state_dtypes=split(options.state_dtypes),
            servers=options.servers,
            times=options.times,
            host_gib=options.host_gib,
            disk_gib=options.disk_gib,
            processes=options.processes,
            progress=lambda done, total: bar.update() and None,
        )
    print(json.dumps(advice.as_record()) if options.json else advice.text())
    return 0
