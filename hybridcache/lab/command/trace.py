"""``hybridcache trace``: statistics, conversion and download of traces."""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from hybridcache.geometry.units import counted
from hybridcache.lab.command.shared import TRACE_HELP, Once, share

if TYPE_CHECKING:
    from hybridcache.lab.command.shared import Commands


FORMS = {
    "jsonl": "this project's own form, complete (default)",
    "mooncake": "hashes of prompts, no ids of answers, for benchmarks that replay by the clock",
}


def add_trace(commands: Commands) -> None:
    """Add the command's parser."""
    trace = commands.add_parser("trace", help="look at a trace, rewrite it, or download one")
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
    convert.add_argument("target", type=Path, metavar="output", help="new file to write")
    convert.register("action", None, Once)
    add = convert.add_argument
    add(
        "--to",
        choices=FORMS,
        default="jsonl",
        help=", ".join(f"{w}: {h}" for w, h in FORMS.items()),
    )
    add("--block", type=int, default=512, help="tokens of a hashed block, for mooncake")
    share(convert, "--skip-bad")
    convert.set_defaults(run=_trace_convert)
    fetch = verbs.add_parser("fetch", help="download a published trace into the cache folder")
    fetch.add_argument("name", nargs="?", help="name of the trace; without it, all are listed")
    fetch.set_defaults(run=_trace_fetch)


def _trace_stats(options: argparse.Namespace) -> int:
    from hybridcache.lab.progress import shown_progress
    from hybridcache.lab.report import stats_table
    from hybridcache.lab.trace_stats import trace_stats
    from hybridcache.lab.traces import open_trace

    trace = open_trace(options.trace, skip_bad=options.skip_bad)
    with shown_progress(None, "requests") as show:
        stats = trace_stats(trace, progress=lambda done: show(done, 0))
    if trace.bad.count:
        print(f"{options.trace}: {trace.bad.left_out()}", file=sys.stderr)
    print(json.dumps(stats.as_record()) if options.json else stats_table(stats))
    return 0


def _trace_convert(options: argparse.Namespace) -> int:
    from hybridcache.lab.traces import open_trace
    from hybridcache.lab.traces.write import write_mooncake, write_own

    trace = open_trace(options.trace, skip_bad=options.skip_bad)
    target = options.target
    if target.is_file():
        raise ValueError(f"{target}: the file exists: remove it, or name another")
    with _written_whole(target) as file:
        if options.to == "jsonl":
            num_requests = write_own(trace, file)
        else:
            num_requests = write_mooncake(trace, file, options.block)
        if not num_requests:
            raise ValueError(f"{options.trace}: {trace.is_empty_because}")
    if trace.bad.count:
        print(f"{options.trace}: {trace.bad.left_out()}", file=sys.stderr)
    found, left_out = counted(num_requests, "request"), counted(trace.bad.count, "bad record")
    print(f"{found} to {target}, {left_out} left out")
    return 0


def _trace_fetch(options: argparse.Namespace) -> int:
    from hybridcache.lab.report import text_table
    from hybridcache.lab.traces.fetch import PUBLISHED, fetch, find_published

    if options.name is None:
        rows = [[name, one.licence, one.content] for name, one in PUBLISHED.items()]
        print(text_table(["name", "licence", "content"], rows))
        return 0
    path, published = fetch(options.name), find_published(options.name)
    print(f"{path}\nlicence {published.licence}, from {published.address}")
    print(f"hybridcache trace stats published:{options.name}")
    return 0


@contextmanager
def _written_whole(path: Path) -> Iterator[TextIO]:
    """Open a new text file, which is removed after an error; with the ending ``.gz`` it is
    compressed. Pipes and devices are written directly."""
    place = path.resolve()  # behind a link: the link stays
    place.parent.mkdir(parents=True, exist_ok=True)
    writes = gzip.open if place.suffix == ".gz" else open
    try:
        with cast("TextIO", writes(place, "wt", encoding="utf-8")) as file:
            yield file
    except BaseException:
        if place.is_file():
            place.unlink()
        raise
