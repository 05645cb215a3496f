"""Compare the default pair with LRU under conditions that other studies hold fixed.

    python -m experiments.studies.conditions [--seeds 5] [--processes 2]

One condition changes at a time: tenants without shared prefixes, the arrival process, the number of
running requests, and the model. A state of these models has the bytes of 7 to 8,000 tokens of KV.
LRU has the fixed placement rules. Memory is short in every row, so both pairs evict.

Rows of one condition can be compared with each other. Rows of two conditions cannot, because their
traces and sizes differ.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from experiments.studies import common
from experiments.tables import Column, Table
from hybridcache import ModelGeometry, Trace, TraceRequest, open_trace
from hybridcache.lab.arrivals import Pauses, interleave, parse_starts
from hybridcache.lab.intervals import interval, paired
from hybridcache.lab.simulation.closed_loop import closed_loop

SEEDS = range(100, 105)
"""Seeds of the evaluation split."""
MODEL = "qwen3-next"
COLUMNS = common.PAIRS | {name: name for name in (common.BEST_REBUILT, common.BOUND)}
MODELS = ("LFM2-1.2B", "Olmo-Hybrid-7B", "Qwen3.5-4B", MODEL, "Nemotron-3-Nano-30B-A3B")
KINDS = ("chat", "agent", "few-shot", "short")
RUNNING = (1, 16, 64)
ARRIVALS = ("fixed:0.5", "poisson:0.5", "bursts:0.5:16")

MEASURED = common.PAIRS | {name: name for name in (*common.REBUILT, common.BOUND)}
"""Pairs, rebuilt systems and the bound by their name in the records."""

Rate = Callable[[int, str], float]
"""Token hit rate with a seed, for a value of ``MEASURED``."""


def replayed(
    trace: Callable[[int], Trace], gib: float, model: str, seed: int, pair: str, **settings: Any
) -> float:
    """Return the token hit rate of a replay of ``trace(seed)``. If requests overlap, only the bound
    in any order holds."""
    opened = trace(seed)
    if pair == common.BOUND and settings:
        return common.bound_in_any_order(opened)
    if pair == common.BOUND:
        return common.bounds(opened, ModelGeometry.preset(model), [gib])[0]
    return common.replay(opened, [gib], pair, model=model, **settings)[0].token_hit_rate


def tenants(kinds: tuple[str, ...], seed: int) -> Trace:
    """Return traces of equal duration, merged by time, each with a separate namespace."""

    def requests_of(tenant: int, kind: str) -> list[TraceRequest]:
        requests = tuple(open_trace(f"{kind}?seed={len(kinds) * seed + tenant}"))
        last_s = max(request.timestamp_s for request in requests)
        return [
            request._replace(
                timestamp_s=request.timestamp_s / last_s,
                session=(tenant, request.session),
                namespace=tenant,
            )
            for request in requests
        ]

    parts = [requests_of(tenant, kind) for tenant, kind in enumerate(kinds)]
    return Trace("tenants", 1, lambda: heapq.merge(*parts, key=lambda request: request.timestamp_s))


def arriving(starts: str, seed: int) -> Trace:
    """Return 120 chats with the arrival process ``starts``. The mean rate is always the same."""
    sessions: dict[Any, list[TraceRequest]] = {}
    for request in open_trace(f"conversations?live=24&num_conversations=120&seed={seed}"):
        sessions.setdefault(request.session, []).append(request)
    turns = list(sessions.values())
    return Trace(starts, 1, lambda: interleave(turns, parse_starts(starts), Pauses(), seed=seed))


def running(count: int, seed: int, pair: str) -> float:
    """Return the token hit rate of an overloaded engine with ``count`` running requests."""
    trace = open_trace(f"conversations?live=24&num_conversations=120&seed={seed}")
    if pair == common.BOUND:
        return common.bound_in_any_order(trace)
    [run] = closed_loop(
        trace,
        gib=8,
        rate=4,
        admission="sessions",
        seeds=[seed],
        max_running=count,
        progress=False,
        **common.caches(pair),
    ).runs
    return run.cached_tokens / run.prompt_tokens


def scaled(model: str) -> Rate:
    """Return the rate on chats, with memory for the same number of KV tokens for every model."""
    geometry = ModelGeometry.preset(model)
    gib = 3 * geometry.kv_bytes_per_token / ModelGeometry.preset(MODEL).kv_bytes_per_token
    return partial(replayed, lambda seed: open_trace(f"chat?seed={seed}"), gib, model)


def rows() -> Iterator[tuple[str, str, Rate]]:
    """Yield (condition, its value, token hit rate)."""
    mixes = {
        "4 tenants, a kind of work each": partial(tenants, KINDS),
        "4 tenants, all chats": partial(tenants, ("chat",) * 4),
    }
    for label, mix in mixes.items():
        yield "tenants", label, partial(replayed, mix, 12, MODEL)
    for starts in ARRIVALS:
        rate = partial(replayed, partial(arriving, starts), 4, MODEL, max_running=16)
        yield "arrivals", starts, rate
    for count in RUNNING:
        yield "running at once", str(count), partial(running, count)
    for model in MODELS:
        worth = ModelGeometry.preset(model).state_tokens
        yield "tokens that a state is worth", f"{worth:,.0f} ({model})", scaled(model)


def measure(job: tuple[str, str, int]) -> list[dict[str, Any]]:
    """Return one record per pair, rebuilt system and bound."""
    condition, value, seed = job
    rate = next(rate for *key, rate in rows() if key == [condition, value])
    same = {"condition": condition, "value": value, "seed": seed}
    return [
        same | {"pair": name, "token_hit_rate": common.rounded(rate(seed, pair))}
        for name, pair in MEASURED.items()
    ]


def table(records: common.Records) -> Table:
    """Return one row per condition: rates in percent, and the gain of the default pair
    over LRU with fixed rules. The best rebuilt system is that of each seed."""
    rows = []
    ours, _, lru = common.PAIRS
    for (condition, value), cells in common.grouped(records, "condition", "value").items():
        rates = {
            pair: [100 * cell["token_hit_rate"] for cell in of]
            for pair, of in common.grouped(cells, "pair").items()
        }
        peers = [rates[name] for name in common.REBUILT if name in rates]
        rates[common.BEST_REBUILT] = [max(of) for of in zip(*peers, strict=True)]
        shown = [interval(rates[name]) if rates.get(name) else None for name in COLUMNS]
        gain = paired(rates[ours], rates[lru])
        rows.append([condition, value + " at once" * value.isdecimal(), *shown, gain])
    columns = [Column(name, "%", reference=of) for name, of in COLUMNS.items()]
    return Table([Column("condition"), Column("value"), *columns, Column("gain", "points")], rows)


def main() -> None:
    options = common.command_line(__doc__).parse_args()
    jobs = [(*key, seed) for *key, _ in rows() for seed in SEEDS[: options.seeds]]
    common.run_study("study_conditions", measure, jobs, table, options.processes)


if __name__ == "__main__":
    main()
