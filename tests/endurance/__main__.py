"""Random operations, requests and faults in three sizes, each with its own reference.

    python -m tests.endurance cache faults --size large
    python -m tests.endurance soak --size 20000 --seed 7

``small`` is a size of the test suite, ``medium`` of `make test-all`, ``large`` of the make target
of the part. A failure ends the run, with the part and the seed that reproduce it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

SIZES = ("small", "medium", "large")


class Part(NamedTuple):
    """One kind of load. The module of its name has ``run(seed, number)``."""

    unit: str
    """Noun that the sizes count."""
    small: int
    medium: int
    large: int


PARTS = {
    "cache": Part("operations", 1_800, 60_000, 1_000_000),
    "waits": Part("loads", 2, 10, 10),
    "torn": Part("calls", 16, 400, 3_000),
    "stores": Part("kills", 3, 50, 200),
    "faults": Part("faults", 4, 10, 10),
    "limits": Part("limits", 2, 10, 60),
    "soak": Part("requests", 60, 5_000, 200_000),
    "grammars": Part("grammars", 5, 100, 100),
    "hostile": Part("rounds", 1, 1, 3),
    "clients": Part("sessions", 1, 2, 2),
}


def run(name: str, size: str, seed: int = 0, **options: Any) -> dict[str, Any]:
    """Run a part. ``size`` is one of SIZES or a number. Raises AssertionError for a fault."""
    number = getattr(PARTS[name], size) if size in SIZES else int(size)
    module = importlib.import_module(f"tests.endurance.{name}")
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # Steps fail on purpose.
    try:
        found: dict[str, Any] = module.run(seed, number, **options)
    finally:
        logging.disable(before)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.endurance", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--size", default="medium", help="small, medium, large or a number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", help="attack of hostile, format of faults, kind of torn, or client"
    )
    options = parser.parse_args(arguments)
    more = {} if options.only is None else {"only": options.only}
    for name in options.parts:
        print(f"{name}: seed {options.seed}", flush=True)
        began = time.monotonic()
        try:
            found = run(name, options.size, options.seed, **more)
        except AssertionError as failure:
            print(f"{name}, seed {options.seed}: failed: {failure}")
            return 1
        print(
            f"{name}: passed in {time.monotonic() - began:.0f} s; {json.dumps(found)}", flush=True
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
