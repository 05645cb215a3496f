"""Command ``engine top``."""

from __future__ import annotations

import argparse


def add_flags(top: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    top.add_argument(
        "--url",
        default="http://127.0.0.1:8000",
        help="address of the server (default: %(default)s)",
    )
    top.add_argument("--key-file", metavar="FILE", help="the server's --admin-key-file")
    top.add_argument("--once", action="store_true", help="print one screen and exit, as in a pipe")


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return the exit code of the process."""
    from engine.plugins.observe.top import top

    return top(arguments.url, arguments.key_file, arguments.once)
