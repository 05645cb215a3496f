"""What several commands share: options, opening a trace, checks."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridcache.config import GRID
from hybridcache.lab.defaults import GIB_SPEC, MODEL

if TYPE_CHECKING:
    from hybridcache.lab.trace import Trace

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

TRACE_HELP = (
    "[word:]file[?option=value&...], or a generator: chat, few-shot, agent, branch, resend, short, "
    "conversations, sharegpt-like ..."
)


SHARED: dict[str, dict[str, Any]] = {
    "--trace": {"required": True, "help": TRACE_HELP},
    "--model": {"default": MODEL, "help": "a preset's name, or the path of a config.json"},
    "--gib": {"default": GIB_SPEC, "help": "memory: low:high:points (log-spaced), or a,b,c"},
    "--grid": {
        "type": int,
        "default": GRID,
        "help": "positions of checkpoints are its multiples, tokens",
    },
    "--state-dtype": {
        "help": "precision of states: float32, bfloat16, int8 (default: the model's own)"
    },
    "--checkpoint-dtype": {
        "default": "auto",
        "help": "of checkpoints alone: bfloat16, int8 or fp8, the last two with :head, :row or "
        ":column (meant where none is said); running states then lie beside the memory (default: "
        "as states are)",
    },
    "--servers": {"type": int, "default": 1, "help": "prefills at the same time, for the TTFT"},
    "--times": {"help": "file of measured prefill times; default: a roofline of H100s"},
    "--processes": {"type": int, "default": 1, "help": "runs at the same time; changes no result"},
    "--ray": {
        "help": "spread the runs over the Ray cluster at this address (auto: this machine's)"
    },
    "--skip-bad": {"action": "store_true", "help": "count records that can not be read"},
}
"""Options of more than one command."""


def share(parser: argparse.ArgumentParser, *flags: str) -> None:
    """Give ``parser`` some of ``SHARED``."""
    for flag in flags:
        parser.add_argument(flag, **SHARED[flag])


def add_tiers(parser: argparse.ArgumentParser) -> None:
    """Memory below the device's, and how fast it is."""
    from hybridcache.geometry.exchange import DISK_BYTES_PER_S, PCIE_BYTES_PER_S

    for word, rate in (("host", PCIE_BYTES_PER_S), ("disk", DISK_BYTES_PER_S)):
        size = f"GiB of {word} memory for what leaves the device; 0: none"
        speed = (
            f"GB/s from {word} to a device, which decide what is fetched (default {rate / 1e9:g})"
        )
        parser.add_argument(f"--{word}-gib", type=float, default=0.0, help=size)
        parser.add_argument(f"--{word}-gb-s", type=float, help=speed)


def tiers_asked(options: argparse.Namespace) -> dict[str, float]:
    """``host_gib``, ``host_gb_s``, ``disk_gib`` and ``disk_gb_s``. ValueError for a speed that none
    can be, or of a tier that is not there."""
    from hybridcache.geometry.exchange import DISK_BYTES_PER_S, PCIE_BYTES_PER_S

    found: dict[str, float] = {}
    for word, rate in (("host", PCIE_BYTES_PER_S), ("disk", DISK_BYTES_PER_S)):
        gib, gb_s = getattr(options, f"{word}_gib"), getattr(options, f"{word}_gb_s")
        if gb_s is not None and not gb_s > 0:
            raise ValueError(f"--{word}-gb-s {gb_s:g}: GB/s above 0 are needed")
        if gb_s is not None and not gib:
            raise ValueError(
                f"--{word}-gb-s is the speed of a tier: say its size with --{word}-gib"
            )
        found[f"{word}_gib"] = gib
        found[f"{word}_gb_s"] = rate / 1e9 if gb_s is None else gb_s
    return found


def opened(spec: str, options: argparse.Namespace) -> Trace:
    """The trace; with ``--skip-bad`` it is read once more, to say what is left out of it.
    ValueError: all of it is."""
    from hybridcache.lab.traces import open_trace

    trace = open_trace(spec, skip_bad=options.skip_bad)
    if options.skip_bad:
        num_requests = sum(1 for _ in trace)
        if not num_requests:
            raise ValueError(f"{spec}: {trace.is_empty_because}")
        left_out = f"{trace.bad.count} bad records left out"
        print(f"{spec}: {num_requests} requests, {left_out}", file=sys.stderr)
    return trace


def split(words: str) -> tuple[str, ...]:
    """Words with commas between, none of them empty."""
    from hybridcache.policies.registry import split_specs

    return tuple(filter(None, split_specs(words)))


def check_figure(path: Path | None) -> None:
    """ValueError for a file that no figure can be written to."""
    if path is not None and path.suffix not in (".png", ".svg"):
        raise ValueError(f"--figure {path}: its name must end in .png or .svg")
