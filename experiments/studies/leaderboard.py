"""Run all built-in evictions on the packaged evaluation split, for the results page.

    python -m experiments.studies.leaderboard [--seeds 3] [--processes 2]

The board is that of ``hybridcache leaderboard``. results/leaderboard.jsonl has a line per trace and
seed, and a line per closed loop and seed.
"""

from __future__ import annotations

import sys

from tqdm import tqdm

from experiments.studies.common import command_line, keep
from hybridcache.lab.leaderboard import Split, leaderboard


def main() -> None:
    options = command_line(__doc__).parse_args()
    split = Split.load().head(options.seeds)
    pause_s = 0.1 if sys.stderr.isatty() else 30
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
