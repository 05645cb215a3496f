"""Command ``engine convert``."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from engine.hub import resolve_folder
from hybridcache.geometry.units import counted, format_bytes

if TYPE_CHECKING:
    from engine.plugins.convert.converter import Conversion


def add_flags(convert: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    convert.add_argument("model", help="model directory in full precision")
    convert.add_argument("out", help="directory to create")
    convert.add_argument(
        "--to",
        choices=("int8", "fp8"),
        required=True,
        help="int8: one scale per output channel, as in compressed-tensors; fp8: one per block of "
        "128 x 128",
    )
    convert.add_argument(
        "--ignore",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATTERN",
        help="additional layers to leave unchanged: words of their names, such as "
        "linear_attn.out_proj, or a regular expression after re:",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return the exit code of the process."""
    from engine.plugins.convert.converter import convert

    done = convert(
        Path(resolve_folder(arguments.model, with_weights=True)),
        Path(arguments.out),
        arguments.to,
        tuple(arguments.ignore),
    )
    print(_conversion_text(done))
    return 0


def _conversion_text(done: Conversion) -> str:
    """Return a table with one line for the same matrix in all layers, and one for all experts."""
    alike = Counter(
        (re.sub(r"\.\d+(?=\.)", ".*", one.module), one.reason or "converted")
        for one in done.modules
    )
    width = max(len(name) for name, _ in alike)
    return "\n".join(
        [
            f"{done.scheme.describe()}: {format_bytes(done.source_bytes)} were converted to "
            f"{format_bytes(done.written_bytes)} in {counted(done.num_files, 'file')}",
            *(f"  {name:<{width}} {count:>9,}   {why}" for (name, why), count in alike.items()),
        ]
    )
