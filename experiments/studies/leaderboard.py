"""Run all built-in evictions on the packaged evaluation split, for the results page.

    python -m experiments.studies.leaderboard [--seeds 3] [--processes 2]

The board is that of ``hybridcache leaderboard``. results/leaderboard.jsonl has a line per trace and
seed, and a line per closed loop and seed.
"""

from __future__ import annotations

import argparse
import sys

from tqdm import tqdm

from experiments.studies.common import keep
from hybridcache.lab.leaderboard import Split, leaderboard


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, help="use only the first N seeds (default: all ten)")
    parser.add_argument("--only", default="", help="use only traces with this in their name")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    pause_s = 0.1 if sys.stderr.isatty() else 30
    split = Split.load().head(options.seeds, options.only)
    with tqdm(total=len(split.jobs(())), unit=" runs", mininterval=pause_s) as bar:
        board = leaderboard(
            (),
            split,
            processes=options.processes,
            progress=lambda done, _: bar.update(done - bar.n) and None,
        )
    keep("leaderboard", [record | {"reference": board.reference} for record in board.records()])
    print(board.table())


if __name__ == "__main__":
    main()
