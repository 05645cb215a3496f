"""Conversion of the weights of a model to eight bits: the command ``engine convert``."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.models import read_model
from engine.weights.hub import resolve_folder


def add_flags(convert: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    convert.add_argument("model", help="model directory in full precision")
    convert.add_argument("out", help="directory to create")
    convert.add_argument(
        "--to",
        choices=("int8", "fp8", "int4", "int4-128"),
        required=True,
        help="int8: one scale per output channel, as in compressed-tensors; fp8: one per block of "
        "128 x 128; int4: compressed-tensors with a scale per 32 columns, or per 128",
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

    source = Path(resolve_folder(arguments.model, read_model))
    print(convert(source, Path(arguments.out), arguments.to, arguments.ignore))
    return 0
