"""Measure whether shadow caches can choose the pair of eviction and placement.

    python -m experiments.studies.shadows [--processes 2]

A shadow is a cache with leases and without tensors. It runs a candidate pair on a sample of the
sessions, with the memory scaled by the sampling rate. Whole sessions are sampled, by a hash of
their first page or of their name. The cache takes the candidate with the most reused tokens in the
last requests of the sample. A candidate must lead by ``LEAD`` of the prompt tokens.

The study does not run the switching cache itself. It reads each pair's own log: after a switch, a
request hits as in a cache that always had the new pair. This favours shadows, because a real cache
has the contents of the old pair. A rule that loses here needs no implementation.

The cost is the number of candidates times the sampling rate, in units of the cache's own work.

Sources: SHARDS (Waldspurger et al., FAST'15); miniature simulations (ATC'17), whose errors are
below 0.01 for scaled caches of thousands of items; set duelling (Qureshi et al., ISCA'07).
"""

from __future__ import annotations

import statistics
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.studies import common
from experiments.studies.common import DEFAULT
from experiments.studies.default import PAIRS, POOLS, Job, jobs_of, splits_file
from experiments.tables import Cell, Column, Table
from hybridcache import ModelGeometry, open_trace
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.simulation.serving import serve
from hybridcache.lab.simulation.target import build_target
from hybridcache.lab.trace import TraceRequest

SPLITS = ("tuning", "outside")
CANDIDATES = (DEFAULT, "survival@backoff", f"survival@{common.STATIC_PLACEMENT}", "lru@adaptive")
RATES = (1.0, 0.5, 0.25, 0.125)
SAMPLES = ("first page", "session")
PAGE = 64
"""Tokens of the first page."""
WINDOW = 64
"""Sampled requests after which a request counts half."""
LEAD = 0.03
"""Lead, as a part of the prompt tokens, that another candidate needs."""

Tokens = npt.NDArray[np.int64]


def main() -> None:
    options = common.command_line(__doc__, seeds=1).parse_args()
    config = splits_file()
    jobs = [
        job._replace(gib=(gib,))
        for split in SPLITS
        for memory in ("", POOLS)
        for job in jobs_of(split + memory, config, options.seeds)
        for gib in job.gib
    ]
    common.run_study("study_shadows", measure, jobs, table, options.processes)


def measure(job: Job) -> list[dict[str, Any]]:
    """Return the record of one trace at one size."""
    split = job.split.removesuffix(POOLS)
    cell = {"split": split, "trace": job.trace, "gib": job.gib[0], "kv_share": job.kv_share}
    return [cell | figures(logs_of(job, ModelGeometry.load(splits_file()["model"])))]


def logs_of(job: Job, geometry: ModelGeometry) -> dict[str, Tokens]:
    """Return the reused tokens per request of all pairs and shadows."""
    trace = open_trace(job.spec)
    requests = list(trace)
    found: dict[str, Tokens] = {"prompt": np.array([r.num_tokens(trace.unit) for r in requests])}
    for pair in PAIRS:
        found[pair] = reused(requests, pair, job, geometry, trace.unit, 1.0)
    for sample in SAMPLES:
        shares = positions(requests, sample)
        for rate in RATES[1:]:
            places = np.flatnonzero(shares < rate)
            found[f"{sample}|{rate:g}"] = places
            chosen = [requests[place] for place in places]
            for pair in CANDIDATES:
                of = reused(chosen, pair, job, geometry, trace.unit, rate)
                found[f"{sample}|{rate:g}|{pair}"] = of
    return found


def positions(requests: Sequence[TraceRequest], sample: str) -> npt.NDArray[np.float64]:
    """Return the position of each request's session in [0, 1): it is in a sample of a rate above
    it."""
    first: dict[Any, float] = {}
    for request in requests:
        key = request.namespace, request.session
        if key not in first:
            text = request.tokens[:PAGE].tobytes()
            hashed = text if sample == "first page" else repr(key).encode() + b"x"
            first[key] = zlib.crc32(hashed) / 2**32
    return np.array([first[r.namespace, r.session] for r in requests])


def reused(
    requests: Sequence[TraceRequest],
    pair: str,
    job: Job,
    geometry: ModelGeometry,
    unit: int,
    rate: float,
) -> Tokens:
    """Return the reused tokens of each request, in a memory scaled by ``rate``. 0 for all if the
    memory holds nothing."""
    eviction, _, placement = pair.partition("@")
    scenario = Scenario(
        job.trace,
        model=geometry,
        gib=job.gib[0] * rate,
        policy=eviction,
        checkpoints=placement,
        **job.memory,
    )
    try:
        target = build_target(scenario, unit)
    except ValueError:
        return np.zeros(len(requests), np.int64)
    log = serve(target, requests, unit, scenario)
    return np.frombuffer(log.cached_tokens, np.int64).copy()


def figures(logs: Mapping[str, Tokens]) -> dict[str, Any]:
    """Return the rates of all pairs, what switching reaches, and the errors of sampled rates."""
    prompt = logs["prompt"]
    total = prompt.sum()
    rates = {pair: 100 * logs[pair].sum() / total for pair in PAIRS}
    everything = np.arange(len(prompt))
    shadows = {"1": reached(logs, everything, {pair: logs[pair] for pair in CANDIDATES})}
    errors: dict[str, float] = {}
    for sample in SAMPLES:
        for rate in RATES[1:]:
            key = f"{sample}|{rate:g}"
            places, scaled = logs[key], {pair: logs[f"{key}|{pair}"] for pair in CANDIDATES}
            shadows[key] = reached(logs, places, scaled)
            if len(places):
                sampled = prompt[places].sum()
                errors[key] = statistics.fmean(
                    abs(100 * scaled[pair].sum() / sampled - rates[pair]) for pair in CANDIDATES
                )
    return {
        "requests": len(prompt),
        "rates": common.rounded({pair: float(rate) for pair, rate in rates.items()}),
        "reached": common.rounded(shadows),
        "errors": common.rounded(errors),
    }


def reached(
    logs: Mapping[str, Tokens], places: npt.NDArray[np.int64], shadows: Mapping[str, Tokens]
) -> float:
    """Return the hit rate in percent of a cache that follows ``shadows``.

    ``places`` are the requests of the sample. A switch takes effect with the next request.
    """
    prompt, chosen, hits = logs["prompt"], DEFAULT, 0
    earned, asked, fading = dict.fromkeys(CANDIDATES, 0.0), 0.0, 0.5 ** (1 / WINDOW)
    rank = {int(place): number for number, place in enumerate(places)}
    for place, length in enumerate(prompt):
        hits += int(logs[chosen][place])
        number = rank.get(place)
        if number is None:
            continue
        for pair, of in shadows.items():
            earned[pair] = fading * earned[pair] + of[number]
        asked = fading * asked + length
        best = max(CANDIDATES, key=lambda pair: earned[pair])
        if earned[best] - earned[chosen] > LEAD * asked:
            chosen = best
    return float(100 * hits / prompt.sum())


def table(records: common.Records) -> Table:
    """Return one row per way to choose the pair.

    Columns: cost, losses to the best pair of a cell by split, and the error of the hit rates.
    """
    by_split = common.grouped(records, "split")
    ways = [("the default alone", "", 0.0), ("shadows, all sessions", "1", float(len(CANDIDATES)))]
    for sample in SAMPLES:
        ways += [
            (f"shadows, {rate:g} by {sample}", f"{sample}|{rate:g}", rate * len(CANDIDATES))
            for rate in RATES[1:]
        ]
    columns = [Column("choice of the pair"), Column("cost", "times the work of the cache", "g")]
    for split in by_split:
        columns += [Column(f"{split}: mean loss", "points", ".2f"), Column("worst", "points")]
    rows = []
    for title, key, cost in ways:
        row: list[Cell] = [title, cost]
        for of in by_split.values():
            losses = [
                max(record["rates"].values())
                - (record["reached"][key] if key else record["rates"][DEFAULT])
                for record in of
            ]
            row += [statistics.fmean(losses), max(losses)]
        errors = [record["errors"][key] for record in records if key in record["errors"]]
        rows.append([*row, statistics.fmean(errors) if errors else ""])
    return Table([*columns, Column("error of hit rates", "points")], rows)


if __name__ == "__main__":
    main()
