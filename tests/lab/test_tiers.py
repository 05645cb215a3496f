"""Tests of simulated host and disk tiers: hits, copy times, and value in device memory."""

from __future__ import annotations

import pytest

from hybridcache import ModelGeometry, simulate
from hybridcache.geometry.exchange import Exchange
from hybridcache.geometry.times import Roofline
from hybridcache.lab.cli import main
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


def test_host_memory_increases_hits_and_saved_time():
    alone, tiered, whole = run(), run(host_gib=8), run(gib=10)
    assert alone.seconds_saved < tiered.seconds_saved <= whole.seconds_saved * 1.001
    assert tiered.token_hit_rate > alone.token_hit_rate + 0.2
    assert tiered.losses is not None
    assert sum(tiered.losses) + tiered.cached_tokens == tiered.prompt_tokens


def test_copy_time_follows_the_bandwidth_of_all_devices():
    tiered = run(host_gib=8, host_gb_s=10)
    assert tiered.tier_bytes is not None
    num_bytes = tiered.tier_bytes["host_to_device_bytes"]
    assert num_bytes / 40e9 < tiered.copy_seconds < num_bytes / 40e9 + 70 * 20e-6
    assert tiered.tier_bytes["device_to_host_bytes"] > 0


def test_loads_slower_than_computing_are_skipped_and_counted():
    alone, slow = run(), run(host_gib=8, host_gb_s=1e-4)
    assert slow.cached_tokens == alone.cached_tokens and slow.copy_seconds == 0
    assert slow.losses is not None and slow.losses.not_fetched > 0
    assert alone.losses is not None and alone.losses.not_fetched == 0


def test_disk_stores_entries_that_do_not_fit_in_host_memory():
    host, both = run(host_gib=0.25), run(host_gib=0.25, disk_gib=8, disk_gb_s=100)
    assert both.seconds_saved > host.seconds_saved
    assert both.tier_bytes is not None and both.tier_bytes["host_to_disk_bytes"] > 0


def test_record_contains_the_tiers_of_each_run():
    result = simulate(TRACE, gib=2, host_gib=8, baseline="marconi", bound=False)
    ours, peer = result.runs
    assert (ours.config.host_gib, peer.config.host_gib) == (8, 0)
    assert ours.label == "survival + 8 GiB host" and peer.tier_bytes is None
    assert RunResult.from_record(ours.as_record()) == ours


def test_exchange_uses_the_units_of_the_trace():
    exchange = Exchange(SHARED, {"host": 1e9}, unit=64)
    saved = exchange.seconds_saved(0, 10, 20, {"host": 1000})
    whole, rest = SHARED.seconds(0, 1280), SHARED.seconds(640, 1280)
    assert saved == pytest.approx(whole - rest - 20e-6 - 1e-6)


def test_command_line_accepts_tiers_and_rejects_invalid_sizes(capsys: pytest.CaptureFixture[str]):
    command = ["simulate", "--trace", "short?head=20", "--gib", "0.3", "--host-gib"]
    assert main([*command, "1"]) == 0
    assert "survival + 1 GiB host" in capsys.readouterr().out
    assert main([*command, "-1"]) == 2
    assert "host_gib -1.0: GiB of 0" in capsys.readouterr().err
    assert main([*command, "0.001"]) == 2
    assert "host_gib 0.001 is too little" in capsys.readouterr().err


def test_error_for_a_small_tier_names_the_argument():
    with pytest.raises(ValueError, match=r"^host_gib 0\.001 is too little for a single state"):
        run(host_gib=0.001)
    with pytest.raises(ValueError, match=r"^disk_gib 0\.01 is too little .* give more, or 0$"):
        run(disk_gib=0.01)
