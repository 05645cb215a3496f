"""Tests of simulated host and disk tiers: hits, copy times, and value in device memory."""

from __future__ import annotations

from hybridcache import ModelGeometry, simulate
from hybridcache.geometry.times import Roofline
from hybridcache.lab.generators import agent
from hybridcache.lab.simulation.result import RunResult

GEOMETRY = ModelGeometry.preset("qwen3-next")
SHARED = Roofline(GEOMETRY, 4, bytes_per_s=1e30, overhead_s=0.0)
TRACE = agent().head(70)


def run(**options: object) -> RunResult:
    """Return one run with LRU and fixed checkpoint positions, so that entries are evicted to the
    tiers."""
    common = {"gib": 2, "times": SHARED, "bound": False, "policy": "lru"}
    (found,) = simulate(
        TRACE, **(common | {"checkpoints": "branch,boundary,backoff,end"} | options)
    ).runs
    return found


def test_loads_slower_than_computing_are_skipped_and_counted():
    alone, slow = run(), run(host_gib=8, host_gb_s=1e-4)
    assert slow.cached_tokens == alone.cached_tokens and slow.copy_seconds == 0
    assert slow.losses is not None and slow.losses.not_fetched > 0
    assert alone.losses is not None and alone.losses.not_fetched == 0


def test_record_contains_the_tiers_of_each_run():
    result = simulate(TRACE, gib=2, host_gib=8, baseline="marconi", bound=False)
    ours, peer = result.runs
    assert (ours.config.host_gib, peer.config.host_gib) == (8, 0)
    assert ours.label == "survival + 8 GiB host" and peer.tier_bytes is None
    assert RunResult.from_record(ours.as_record()) == ours
