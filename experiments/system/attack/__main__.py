"""Attack cache, engine and server, each with its own reference model or client.

    python -m experiments.system.attack --minutes 10
    python -m experiments.system.attack --only cache --seed 7

A violation ends the run, with the part and the seed that reproduce it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

from experiments.provenance import RESULTS, write_json_lines
from experiments.system.attack import bodies, cache, churn
from hybridcache.command.parser import Parser

Part = Callable[[int, float], dict[str, int]]


PARTS: dict[str, tuple[Part, float]] = {
    "cache": (cache.attack, 0.45),
    "churn": (churn.attack, 0.35),
    "bodies": (bodies.attack, 0.2),
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
