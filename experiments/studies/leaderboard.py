"""Run all built-in evictions on the packaged evaluation split, for the results page.

    python -m experiments.studies.leaderboard [--seeds 3] [--processes 2]

The board is that of ``hybridcache leaderboard``. leaderboard.jsonl has a line per trace and
seed, and a line per closed loop and seed.
"""

from __future__ import annotations

from experiments.studies.common import command_line, keep
from hybridcache.lab.leaderboard import leaderboard


def main() -> None:
    options = command_line(__doc__).parse_args()
    board = leaderboard(seeds=options.seeds, processes=options.processes)
    keep("leaderboard", [one.as_record() | {"reference": board.reference} for one in board.scores])
    print(board.table())


if __name__ == "__main__":
    main()
