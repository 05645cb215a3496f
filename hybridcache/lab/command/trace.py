"""``hybridcache trace``: look at a trace, or rewrite it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hybridcache.lab.command.shared import TRACE_HELP, share

if TYPE_CHECKING:
    from hybridcache.lab.command.shared import Commands


FORMS = {
    "jsonl": "the project's own, nothing left out (default)",
    "mooncake": "whole prompts as hashes, which serving benchmarks replay by the clock",
    "aiperf": "turns of conversations, each after the answer before",
}


def add_trace(commands: Commands) -> None:
    """The command's parser."""
    trace = commands.add_parser("trace", help="look at a trace, or rewrite it")
    verbs = trace.add_subparsers(title="verbs", required=True)
    stats = verbs.add_parser(
        "stats", help="requests, lengths, ideal hit rate, reuse, sharing by depth"
    )
    stats.add_argument("trace", help=TRACE_HELP)
    share(stats, "--skip-bad")
    stats.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    stats.set_defaults(run=_trace_stats)
    convert = verbs.add_parser("convert", help="write any trace in another form")
    convert.add_argument("trace", help=TRACE_HELP)
    convert.add_argument("output", type=Path, help="file to write")
    add = convert.add_argument
    add(
        "--to",
        choices=FORMS,
        default="jsonl",
        help=", ".join(f"{w}: {h}" for w, h in FORMS.items()),
    )
    add("--block", type=int, default=512, help="tokens a hash stands for in the last two")
    share(convert, "--skip-bad")
    convert.set_defaults(run=_trace_convert)


def _trace_stats(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from hybridcache.lab.report import stats_table
    from hybridcache.lab.trace_stats import trace_stats
    from hybridcache.lab.traces import open_trace

    trace = open_trace(options.trace, skip_bad=options.skip_bad)
    with tqdm(unit=" requests", disable=None, file=sys.stderr) as bar:
        stats = trace_stats(trace, progress=lambda _: bar.update() and None)
    if not stats.num_requests:
        raise ValueError(f"{options.trace}: there is no request in it")
    print(json.dumps(stats.as_record()) if options.json else stats_table(stats))
    return 0


def _trace_convert(options: argparse.Namespace) -> int:
    from hybridcache.lab.traces import aiperf, jsonl, mooncake, open_trace

    trace = open_trace(options.trace, skip_bad=options.skip_bad)
    with options.output.open("w", encoding="utf-8") as file:
        if options.to == "jsonl":
            num_requests = jsonl.write(trace, file)
        else:
            write = mooncake.write if options.to == "mooncake" else aiperf.write
            num_requests = write(trace, file, options.block)
    print(f"{num_requests} requests to {options.output}, {trace.bad.count} bad records left out")
    return 0
