"""Results of one fleet over one trace, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from hybridcache.geometry.times import PrefillTimes, describe_times
from hybridcache.geometry.units import GIB
from hybridcache.lab.replicas.fleet import Arithmetic, FleetConfig
from hybridcache.lab.replicas.serving import FleetLog
from hybridcache.lab.report import text_table
from hybridcache.lab.simulation.result import PERCENTILES
from hybridcache.lab.simulation.target import RunConfig


@dataclass(frozen=True, slots=True)
class FleetResult:
    """One cell. Counts are in tokens, for any unit of the trace; sizes are those of one replica."""

    trace: str
    model: str
    gib: float
    policy: str
    checkpoints: str
    fleet: FleetConfig
    times: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    overpromised_tokens: int
    """Tokens that the router expected on the chosen replica and that were computed."""
    underpromised_tokens: int
    """Reused tokens that the router did not expect."""
    ttft_s: dict[int, float]
    """Percentiles of the time from when a request could be asked to its first token."""
    ttft_mean_s: float
    cold_mean_s: float
    """Mean prefill time of a prompt without any reuse, for comparison."""
    busy_share: float
    """Share of the fleet's time spent in prefills."""
    imbalance: float
    """Prefill seconds of the busiest place over the mean; 1 is perfect."""
    rerouted: int
    """Requests that lost their replica before the first token, and were routed again."""
    broken: int
    """Requests that lost their replica after the first token: their answers ended early."""
    bypassed: int

    @property
    def token_hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def as_record(self) -> dict[str, Any]:
        """Return a record for JSON."""
        return asdict(self) | {"token_hit_rate": self.token_hit_rate}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> FleetResult:
        """Restore the result of ``as_record`` after a trip through JSON."""
        values = {field.name: record[field.name] for field in fields(cls)}
        values["fleet"] = FleetConfig(**record["fleet"])
        values["ttft_s"] = {int(rank): value for rank, value in record["ttft_s"].items()}
        return cls(**values)


def summarise_fleet(
    config: RunConfig, fleet: FleetConfig, log: FleetLog, times: PrefillTimes, trace: str
) -> FleetResult:
    """Return the figures of one run. O(requests)."""
    requests = log.requests
    lengths = np.frombuffer(requests.prompt_tokens, np.int64)
    cached = np.frombuffer(requests.cached_tokens, np.int64)
    expected = np.frombuffer(log.expected_tokens, np.int64)
    ttft = np.frombuffer(requests.ttft_s, np.float64)
    cold = [times.seconds(0, length) for length in lengths.tolist()]
    busy = np.array(log.busy_s)
    assert config.budget_bytes is not None
    return FleetResult(
        trace=trace,
        model=config.geometry.name,
        gib=config.budget_bytes / GIB,
        policy=str(config.policy),
        checkpoints=str(config.checkpoints),
        fleet=fleet,
        times=_described(times),
        requests=len(lengths),
        prompt_tokens=int(lengths.sum()),
        cached_tokens=int(cached.sum()),
        overpromised_tokens=int(np.maximum(expected - cached, 0).sum()),
        underpromised_tokens=int(np.maximum(cached - expected, 0).sum()),
        ttft_s={rank: float(np.percentile(ttft, rank)) for rank in PERCENTILES},
        ttft_mean_s=float(ttft.mean()),
        cold_mean_s=float(np.mean(cold)),
        busy_share=float(busy.sum() / (fleet.replicas * log.seconds)) if log.seconds else 0.0,
        imbalance=float(busy.max() / busy.mean()) if busy.sum() else 1.0,
        rerouted=log.rerouted,
        broken=log.broken,
        bypassed=requests.num_bypassed,
    )


def _described(times: PrefillTimes) -> str:
    if isinstance(times, Arithmetic):
        return f"arithmetic at {times.flops_per_s:.4g} FLOP/s"
    return describe_times(times)


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
    """Return a table for each size, with the routers in their order of appearance."""
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
