"""Tables of fleets: a line a router."""

from __future__ import annotations

from collections.abc import Sequence

from hybridcache.lab.replicas.result import FleetResult
from hybridcache.lab.report import text_table

HEADER = (
    "router",
    "hit, %",
    "overpromised, %",
    "TTFT mean, s",
    "p50",
    "p95",
    "p99",
    "busiest / mean",
    "prefilling, %",
    "rerouted",
    "broken",
)


def fleet_table(results: Sequence[FleetResult]) -> str:
    """A table for each size, routers in the order in which they came."""
    tables = []
    for gib in dict.fromkeys(run.gib for run in results):
        runs = [run for run in results if run.gib == gib]
        first = runs[0]
        fleet = first.fleet
        title = (
            f"{first.trace}: {first.requests:,} requests, {fleet.replicas} replicas of {gib:g} GiB "
            f"({first.model}, {first.policy} @ {first.checkpoints}); events {fleet.delay_s:g} s "
            f"late, {fleet.failures} failures; {first.times}, a cold prompt "
            f"{first.cold_mean_s:.3g} s on average"
        )
        tables.append(f"{title}\n{text_table(HEADER, [_row(run) for run in runs])}")
    return "\n\n".join(tables)


def _row(run: FleetResult) -> tuple[str, ...]:
    return (
        run.fleet.router,
        f"{100 * run.token_hit_rate:.1f}",
        f"{100 * run.overpromised_tokens / max(run.prompt_tokens, 1):.1f}",
        f"{run.ttft_mean_s:.3g}",
        *(f"{run.ttft_s[rank]:.3g}" for rank in (50, 95, 99)),
        f"{run.imbalance:.2f}",
        f"{100 * run.busy_share:.0f}",
        str(run.rerouted),
        str(run.broken),
    )
