"""Measure the processor time and the function calls of a simulated request.

    python -m experiments.benchmarks.simulate

The default policies and LRU with fixed rules run in alternation over generated traces, at sizes
where both evict. A request's time includes lease, tree, policies and the simulator's loop, without
the generation of the trace. The number of calls, of Python and C functions, does not depend on
the load of the machine. The garbage collector has the settings of the command line.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import statistics
from functools import partial
from time import process_time
from typing import Any

from tqdm import tqdm

from experiments.benchmarks.timing import alternate
from experiments.studies.common import STATIC_PLACEMENT, keep, plain_table
from hybridcache.lab.runs.grid import collect_seldom
from hybridcache.lab.runs.simulate import run_cell
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.traces.generators import GENERATORS

TURNS = 10
PRESSED_GIB = {"chat": 6, "agent": 3, "short": 1.5, "conversations": 12, "tree-search": 0.75}
"""Sizes at which both evict, in GiB."""


def compare(trace_name: str, gib: float) -> dict[str, Any]:
    """Return time, calls and hit rate of both pairs on one trace."""
    trace = GENERATORS[trace_name]().kept()
    num_requests = sum(1 for _ in trace)
    default = Scenario(trace, gib=float(gib))
    cells = {
        "lru": Scenario(trace, gib=float(gib), policy="lru", checkpoints=STATIC_PLACEMENT),
        "default": default,
    }
    calls = {name: partial(run_cell, trace, cell) for name, cell in cells.items()}
    taken = alternate(calls, TURNS, process_time, prepare=gc.collect)
    record: dict[str, Any] = {"trace": trace_name, "gib": gib, "requests": num_requests}
    for name, call in calls.items():
        profile = cProfile.Profile()
        result = profile.runcall(call)
        record[f"{name}_us"] = round(statistics.median(taken[name]) / num_requests * 1e6)
        num_calls = pstats.Stats(profile).total_calls  # type: ignore[attr-defined]
        record[f"{name}_calls"] = round(num_calls / num_requests)
        record[f"{name}_token_hit_rate"] = round(result.token_hit_rate, 3)
    pairs = zip(taken["default"], taken["lru"], strict=True)
    return record | {"ratio": round(statistics.median(one / two for one, two in pairs), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.parse_args()
    collect_seldom()
    records = [compare(*item) for item in tqdm(PRESSED_GIB.items(), unit=" traces", disable=None)]
    keep("bench_simulate_default", records, table=plain_table)


if __name__ == "__main__":
    main()
