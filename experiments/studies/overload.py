"""Measure overload in closed loop over time: a warm-up is cut, and windows have a fixed length.

    python -m experiments.studies.overload [--sessions 60 150] [--seeds 11] [--workers 2]

More sessions arrive than the server can finish, so there is no steady state: queues grow until the
last arrival. Figures of a whole run depend on its length. This study reports each policy by windows
of ``WINDOW_S`` from the end of the warm-up to the last arrival, for several numbers of sessions.
Windows of runs of different lengths must agree, because later arrivals change nothing before them.
The workload is `agents` of the admission study.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf, isinf
from statistics import fmean
from typing import Any

import numpy as np

from experiments.studies.admission import WORKLOADS
from experiments.studies.common import keep, measured, rounded
from hybridcache import ModelGeometry
from hybridcache.geometry.units import GIB
from hybridcache.lab.report import text_table
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.simulation.closed_loop import simulate_closed_loop
from hybridcache.lab.simulation.step_times import LinearSteps

WORKLOAD, RATE = "agents", 0.2
POLICIES = ("oldest", "sessions", "live:18")
WARM_UP_S, WINDOW_S = 150.0, 150.0
FIGURES = (
    ("token_hit_rate", "hits, %", 100),
    ("ttft_mean_s", "mean TTFT, s", 1),
    ("ttft_p99_s", "p99, s", 1),
    ("first_tokens", "first tokens", 1),
)
"""Field, title and scale of each figure."""

Case = tuple[str, int, int]
"""(admission, number of sessions, seed)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sessions", type=int, nargs="+", default=[60, 150])
    parser.add_argument("--seeds", type=int, nargs="+", default=[11])
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    cases = [(p, n, s) for n in options.sessions for p in POLICIES for s in options.seeds]
    found = measured(serve, cases, options.workers)
    records = [record for several in found for record in several]
    keep("overload", records)
    print(text_table(*table(records)))


def serve(case: Case) -> list[dict[str, Any]]:
    """Return a record of the whole run, and one per window."""
    admission, num_sessions, seed = case
    workload = replace(WORKLOADS[WORKLOAD], num_sessions=num_sessions)
    geometry = ModelGeometry.preset("qwen3-next")
    cell = Scenario(
        WORKLOAD,
        model=geometry,
        gib=workload.num_rows * geometry.kv_bytes_per_token / GIB,
        policy="survival",
        checkpoints="adaptive",
        times=LinearSteps(),
        rate=RATE,
        seeds=(seed,),
        token_budget=workload.token_budget,
        admission=admission,
        tells_ends=admission.startswith("live"),
    )
    served = simulate_closed_loop(workload.trace(WORKLOAD, seed), cell)
    asked_s, first_s = np.array(served.asked_s), np.array(served.first_token_s)
    cached, prompt = np.array(served.cached_tokens), np.array(served.prompt_tokens)
    facts = {"admission": admission, "sessions": num_sessions, "seed": seed}
    return [
        facts | {"from_s": start_s, "to_s": None if isinf(end_s) else end_s} | rounded(figures)
        for start_s, end_s in windows(num_sessions)
        if (figures := window_figures(asked_s, first_s, cached, prompt, start_s, end_s))
    ]


def windows(num_sessions: int) -> Iterator[tuple[float, float]]:
    """Yield the whole run, and the windows between warm-up and the mean time of the last arrival,
    in seconds."""
    yield 0.0, inf
    start_s = WARM_UP_S
    while start_s + WINDOW_S <= num_sessions / RATE:
        yield start_s, start_s + WINDOW_S
        start_s += WINDOW_S


def window_figures(
    asked_s: np.ndarray,
    first_s: np.ndarray,
    cached: np.ndarray,
    prompt: np.ndarray,
    start_s: float,
    end_s: float,
) -> dict[str, float]:
    """Return hit rate, waiting times and throughput of the requests that arrived from ``start_s``
    to ``end_s``. Empty if there is none."""
    chosen = (asked_s >= start_s) & (asked_s < end_s)
    if not chosen.any():
        return {}
    ttft_s = (first_s - asked_s)[chosen]
    begun = (first_s >= start_s) & (first_s < end_s)
    return {
        "requests": int(chosen.sum()),
        "token_hit_rate": float(cached[chosen].sum() / prompt[chosen].sum()),
        "ttft_mean_s": float(ttft_s.mean()),
        "ttft_p99_s": float(np.percentile(ttft_s, 99)),
        "first_tokens": int(begun.sum()),
    }


def table(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return a header and one row per length and window, as means over seeds."""
    cells: dict[tuple[int, float, float | None], dict[str, list[Mapping[str, Any]]]] = {}
    for one in records:
        cell = cells.setdefault((one["sessions"], one["from_s"], one["to_s"]), {})
        cell.setdefault(one["admission"], []).append(one)
    rows = []
    for (num_sessions, start_s, end_s), of in cells.items():
        window = f"{start_s:g} to {end_s:g} s" if end_s is not None else "whole run"
        row = [f"{num_sessions} sessions", window]
        for name, _, scale in FIGURES:
            row += [f"{scale * fmean(one[name] for one in of[policy]):.1f}" for policy in POLICIES]
        rows.append(row)
    heads = [f"{title}: `{policy}`" for _, title, _ in FIGURES for policy in POLICIES]
    return ["length", "window", *heads], rows


if __name__ == "__main__":
    main()
