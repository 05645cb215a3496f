"""Run all built-in evictions on the packaged evaluation split, for the results page.

    python -m experiments.studies.leaderboard [--seeds 3] [--processes 2]

The board is that of ``hybridcache leaderboard``. leaderboard.jsonl has a line per trace and
seed, and a line per closed loop and seed, each with the figures of all policies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from experiments.studies.common import Records, command_line, keep
from hybridcache.lab.board.ranking import PLAN, Board, Measured, Split, board


def records(found: Board) -> Iterator[dict[str, Any]]:
    """Yield the lines of the file."""
    split = found.split
    runs = {(run.system, run.cell, run.seed): run for run in found.runs}
    for loop in (None, 0, 1):
        for cell in split.cells:
            for seed in split.seeds if loop is None or loop < len(cell.loops) else ():
                of = {name: runs[name, cell.name, seed] for name in (*split.policies, PLAN)}
                plan = of.pop(PLAN)
                line = {"trace": cell.name, "seed": seed, "reference": split.reference}
                if loop is None:
                    yield line | {
                        "gib": plan.gib,
                        "rates": {name: run.replay for name, run in of.items()},
                        **{"plan": plan.replay, "bound": plan.bound, "rate": None, "ttft_s": {}},
                    }
                    continue
                size, rate = cell.loops[loop]
                served = {name: run.loops[loop] for name, run in of.items()}
                yield line | {
                    "gib": [size],
                    "rates": {name: [one["token_hit_rate"]] for name, one in served.items()},
                    **{"plan": [], "bound": [], "rate": rate},
                    "ttft_s": {name: one["ttft_mean_s"] for name, one in served.items()},
                }


def board_of(lines: Records, split: Split) -> Board:
    """Return the board of the lines of a file, which has the seeds of ``split``."""
    runs: dict[tuple[str, int, str], Measured] = {}
    for one in lines:
        for name, rates in (one["rates"] | {PLAN: one["plan"]}).items():
            key = one["trace"], one["seed"], name
            if one["rate"] is None:
                bound = one.get("bound", []) if name == PLAN else []
                runs[key] = Measured(*key, one["gib"], [], rates, bound=bound)
            elif name != PLAN:
                served = {"token_hit_rate": rates[0], "ttft_mean_s": one["ttft_s"][name]}
                runs[key].loops.append(served)
    return Board(replace(split, reference=lines[0]["reference"]), tuple(runs.values()))


def main() -> None:
    options = command_line(__doc__).parse_args()
    found = board(seeds=options.seeds, processes=options.processes)
    keep("leaderboard", records(found))
    print(found.table())


if __name__ == "__main__":
    main()
