"""Attack cache, engine, server and files, each with its own reference model or client.

    python -m experiments.system.attack --minutes 10
    python -m experiments.system.attack --only files --seed 7

A violation ends the run, with the part and the seed that reproduce it.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence

from experiments.provenance import RESULTS, write_json_lines
from experiments.system.attack import bodies, cache, churn, snapshots
from hybridcache.lab.parser import Parser

Part = Callable[[int, float], dict[str, int]]


def files(seed: int, seconds: float) -> dict[str, int]:
    """Load changed snapshots of one cache after another."""
    deadline, found, caches = time.monotonic() + seconds, {"refused": 0, "loaded": 0}, 0
    while time.monotonic() < deadline:
        outcomes = snapshots.attack(seed + caches, 1, 60)
        found = {outcome: found[outcome] + outcomes[outcome] for outcome in found}
        caches += 1
    return {"caches": caches} | found


PARTS: dict[str, tuple[Part, float]] = {
    "cache": (cache.attack, 0.35),
    "churn": (churn.attack, 0.25),
    "bodies": (bodies.attack, 0.2),
    "files": (files, 0.2),
}
"""Parts by name, each with its share of the time."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m experiments.system.attack", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--only", choices=sorted(PARTS), help="run only this part")
    options = parser.parse_args(arguments)
    parts = {options.only: (PARTS[options.only][0], 1.0)} if options.only else PARTS
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # Steps fail on purpose.
    try:
        records = []
        for name, (attack, share) in parts.items():
            try:
                found = attack(options.seed, 60 * options.minutes * share)
            except AssertionError as failure:
                print(f"{name}: failed: {failure}")
                return 1
            counts = ", ".join(f"{number:,} {key}" for key, number in found.items())
            print(f"{name}: passed; {counts}")
            records.append({"part": name, **found})
    finally:
        logging.disable(before)
    if not options.only:
        write_json_lines(RESULTS / "attack.jsonl", records, vars(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
