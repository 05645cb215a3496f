"""Measure overload in closed loop over time: a warm-up is cut, and windows have a fixed length.

    python -m experiments.studies.overload [--seeds 2] [--processes 2]

More sessions arrive than the server can finish, so there is no steady state: queues grow until the
last arrival. Figures of a whole run depend on its length. This study reports each policy by windows
of ``WINDOW_S`` from the end of the warm-up to the last arrival, for several numbers of sessions.
Windows of runs of different lengths must agree, because later arrivals change nothing before them.
`lru@adaptive` (with `sessions`) and rebuilt systems are served too. A window has other requests for
each of them, so only whole runs have an upper bound, that of ``common.bound_in_any_order``.
The workload is `agents` of the admission study.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from math import inf, isinf
from statistics import fmean
from typing import Any

import numpy as np

from experiments.studies import common
from experiments.studies.admission import CACHES, REBUILT, SPLITS, WORKLOADS, scenario
from experiments.tables import Cell, Column, Table
from hybridcache.lab.runs.closed_loop import simulate_closed_loop

WORKLOAD, RATE = "agents", 0.2
SESSIONS = (60, 150)
WHOLE = "whole run"
POLICIES = ("oldest", "sessions", "live:18")
WARM_UP_S, WINDOW_S = 150.0, 150.0
IN_TIME_S = 2.0
FIGURES = (
    ("token_hit_rate", "hits, %", 100),
    ("ttft_mean_s", "mean TTFT, s", 1),
    ("ttft_p99_s", "p99, s", 1),
    ("first_tokens", "first tokens", 1),
)
LATER = (
    ("later_mean_s", "mean of later turns, s", 1),
    ("later_in_time", f"later turns within {IN_TIME_S:g} s, %", 100),
)
"""Field, title and scale of each figure, and of those with one column for all policies."""


def main() -> None:
    options = common.command_line(__doc__, seeds=2).parse_args()
    seeds = SPLITS["evaluation"]["seeds"][: options.seeds]
    jobs = list(product(SESSIONS, (*POLICIES, *CACHES), seeds))
    common.run_study("overload", serve, jobs, table, options.processes)


def serve(job: tuple[int, str, int]) -> list[dict[str, Any]]:
    """Return a record of the whole run of (sessions, policy, seed), and one per window."""
    num_sessions, admission, seed = job
    workload = replace(WORKLOADS[WORKLOAD], num_sessions=num_sessions)
    cell = scenario(workload, WORKLOAD, seed, RATE, admission)
    trace = workload.trace(WORKLOAD, seed)
    answered = simulate_closed_loop(trace, cell).answered
    facts = {"admission": admission, "sessions": num_sessions, "seed": seed}
    facts["bound"] = common.bound_in_any_order(trace)
    return [
        facts
        | {"from_s": start_s, "to_s": None if isinf(end_s) else end_s}
        | common.rounded(window_figures(answered, start_s, end_s))
        for start_s, end_s in windows(num_sessions)
    ]


def windows(num_sessions: int) -> Iterator[tuple[float, float]]:
    """Yield the whole run, and the windows between warm-up and the mean time of the last arrival,
    in seconds."""
    yield 0.0, inf
    start_s = WARM_UP_S
    while start_s + WINDOW_S <= num_sessions / RATE:
        yield start_s, start_s + WINDOW_S
        start_s += WINDOW_S


def window_figures(answered: Sequence[Any], start_s: float, end_s: float) -> dict[str, float]:
    """Return hit rate and waiting times of the requests that arrived from ``start_s`` to ``end_s``,
    and the number of first tokens in that time."""
    chosen = [one for one in answered if start_s <= one.arrival_s < end_s]
    ttft_s = np.array([one.first_token_s - one.arrival_s for one in chosen])
    later_s = [one.first_token_s - one.arrival_s for one in chosen if one.turn]
    cached_tokens = sum(one.cached_len for one in chosen)
    return {
        "requests": len(chosen),
        "token_hit_rate": cached_tokens / sum(one.prompt_len for one in chosen),
        "ttft_mean_s": float(ttft_s.mean()),
        "ttft_p99_s": float(np.percentile(ttft_s, 99)),
        "first_tokens": sum(start_s <= one.first_token_s < end_s for one in answered),
        "later_mean_s": fmean(later_s),
        "later_in_time": fmean(wait_s <= IN_TIME_S for wait_s in later_s),
    }


def table(records: common.Records) -> Table:
    """Return one row per length and window, as means over seeds."""
    rows = []
    for (num_sessions, start_s, end_s), cells in common.grouped(
        records, "sessions", "from_s", "to_s"
    ).items():
        of = common.grouped(cells, "admission")
        window = f"{start_s:g} to {end_s:g} s" if end_s is not None else WHOLE
        row: list[Cell] = [f"{num_sessions} sessions", window]
        cell = {
            name: [scale * fmean(one[name] for one in of[policy]) for policy in POLICIES]
            for name, _, scale in (*FIGURES, *LATER)
        }
        row += [value for name, *_ in FIGURES for value in cell[name]]
        row += [cell[name] for name, *_ in LATER]
        lru, *peers = ([one["token_hit_rate"] for one in of.get(cache, ())] for cache in CACHES)
        best = [max(runs) for runs in zip(*filter(None, peers), strict=True)]
        bounds = [one["bound"] for one in cells if end_s is None and "bound" in one]
        waits_s = [fmean(one["ttft_mean_s"] for one in of[peer]) for peer in REBUILT if peer in of]
        row += map(common.percent, (lru, best, bounds))
        rows.append([*row, min(waits_s, default=None)])
    heads = [f"{title}: `{policy}`" for _, title, _ in FIGURES for policy in POLICIES]
    every = ", ".join(f"`{policy}`" for policy in POLICIES)
    heads += [f"{title}: {every}" for _, title, _ in LATER]
    columns = [*map(Column, ("length", "window", *heads)), *common.references("{}, hits")]
    return Table([*columns, Column("mean TTFT, s: best rebuilt system")], rows)


if __name__ == "__main__":
    main()
