"""Measure the gain of a truthful and of a lying client from promises to return.

    python -m experiments.studies.promises [--seeds 5] [--processes 2]

Two tenants send the same kind of traffic. After an answer an agent runs a tool, and its next turn
comes within seconds; or it waits for a person, or has ended. Tenant A promises nothing, promises
the tools' time limit where it is true, promises it after every answer, or promises an hour after
every answer. Tenant B never promises. Both also share one namespace, where promises of one count
against the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product
from statistics import fmean
from typing import Any

import numpy as np

from experiments.studies import common
from experiments.tables import Cell, Column, Table
from hybridcache.lab.runs import serving
from hybridcache.lab.runs.target import build_target
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.traces.intervals import paired
from hybridcache.lab.traces.trace import TraceRequest

TOOL_LIMIT_S, HOUR_S = 20.0, 3600.0
SESSIONS = 150
GAP_S = 4.0
"""Mean time between the starts of two sessions of one tenant."""
MEMORIES_GIB = (4.0, 8.0)
CLIENTS = ("silent", "truthful", "always", "an hour")
NAMESPACES = ("own", "shared")


def main() -> None:
    options = common.command_line(__doc__, seeds=5).parse_args()
    jobs = list(product(NAMESPACES, MEMORIES_GIB, CLIENTS, range(options.seeds)))
    common.run_study("promises", serve, jobs, table, options.processes)


def requests(client: str, seed: int) -> list[TraceRequest]:
    """Return the requests of both tenants in order of time, with the promises of ``client``."""
    found = [*_requests("A", client, seed), *_requests("B", "silent", seed + 1000)]
    return sorted(found, key=lambda request: request.timestamp_s)


def _requests(tenant: str, client: str, seed: int) -> Iterator[TraceRequest]:
    rng = np.random.default_rng(seed)

    def text(low: int, high: int) -> np.ndarray:
        return rng.integers(0, 50_000, rng.integers(low, high), np.int32)

    starts_s = np.cumsum(rng.exponential(GAP_S, SESSIONS))
    for session, now_s in enumerate(starts_s.tolist()):
        tokens = text(2000, 6000)
        for left in reversed(range(int(rng.integers(4, 16)))):
            tokens, answer = np.concatenate((tokens, text(100, 700))), text(30, 120)
            runs_tool = left > 0 and rng.random() < 0.6
            promised_s = {
                "silent": None,
                "truthful": TOOL_LIMIT_S if runs_tool else None,
                "always": TOOL_LIMIT_S,
                "an hour": HOUR_S,
            }[client]
            yield TraceRequest(
                now_s, (tenant, session), tenant, tokens, answer, returns_within_s=promised_s
            )
            tokens = np.concatenate((tokens, answer))
            median_s = 4.0 if runs_tool else 90.0
            pause_s = float(rng.lognormal(np.log(median_s), 0.7))
            now_s += min(pause_s, TOOL_LIMIT_S) if runs_tool else TOOL_LIMIT_S + pause_s


def serve(job: tuple[str, float, str, int]) -> list[dict[str, Any]]:
    """Return a record with the hit rates of both tenants for (namespaces, memory, client, seed)."""
    namespaces, gib, client, seed = job
    cell, cached, asked = Scenario("promises", gib=gib), Counter[Any](), Counter[Any]()
    sent = requests(client, seed)
    tenants = [one.namespace for one in sent]
    if namespaces == "shared":
        sent = [one._replace(namespace=None) for one in sent]
    log = serving.serve(build_target(cell, 1), sent, 1, cell)
    for tenant, prompt, reused in zip(tenants, log.prompt_tokens, log.cached_tokens, strict=True):
        asked[tenant] += prompt
        cached[tenant] += reused
    rates = {f"hits_{tenant}": cached[tenant] / asked[tenant] for tenant in "AB"}
    facts = {"namespaces": namespaces, "gib": gib, "client": client, "seed": seed}
    return [facts | common.rounded(rates)]


def table(records: common.Records) -> Table:
    """Return one row per memory and client: means over seeds, and changes from silence."""
    rows: list[list[Cell]] = []
    for (namespaces, gib), cells in common.grouped(records, "namespaces", "gib").items():
        of = common.grouped(cells, "client")
        for client in CLIENTS:
            row: list[Cell] = [namespaces, f"{gib:g} GiB", client]
            for name in ("hits_A", "hits_B"):
                rates, silent = ([100 * one[name] for one in of[who]] for who in (client, "silent"))
                row += [fmean(rates), paired(rates, silent) if client != "silent" else None]
            rows.append(row)
    texts = map(Column, ("namespaces", "memory", "tenant A"))
    figures = (("token hit rate", "%"), ("change", "points"))
    heads = [Column(f"{figure} of {tenant}", unit) for tenant in "AB" for figure, unit in figures]
    return Table([*texts, *heads], rows)


if __name__ == "__main__":
    main()
