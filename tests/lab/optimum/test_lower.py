"""Tests of the optimum with host and disk tiers: capacities and copy prices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybridcache import ModelGeometry
from hybridcache.geometry.units import GIB
from hybridcache.lab.cli import main
from hybridcache.lab.generators import agent
from hybridcache.lab.optimum import LowerBudget, Method, Optimum, best_plan, lower_budgets

TRACE = agent().head(40)


def best(device_gib: float, *lower: tuple[float, float], method: Method = "lp") -> Optimum:
    return best_plan(
        TRACE,
        capacity_bytes=int(device_gib * GIB),
        kv_bytes_per_token=24576,
        state_bytes=77_266_944,
        grid=64,
        method=method,
        lower=tuple(LowerBudget(int(gib * GIB), price) for gib, price in lower),
    )


def bound(found: Optimum) -> float:
    assert found.bound is not None
    return found.bound


@pytest.fixture(scope="module")
def alone() -> Optimum:
    return best(0.5)


def test_capacities_of_tiers_add_up_if_copies_are_free(alone: Optimum):
    tiered, whole = best(0.5, (0.5, 0.0)), best(1.0)
    assert bound(tiered) == pytest.approx(bound(whole), abs=1e-6)
    assert bound(whole) > bound(alone) + 0.05
    three = best(0.5, (0.25, 0.0), (0.25, 0.0), method="greedy")
    assert alone.reached < three.reached <= bound(whole) + 1e-9


def test_tier_with_expensive_copies_gains_nothing(alone: Optimum):
    tiered = best(0.5, (8.0, 1.0))
    assert bound(tiered) == pytest.approx(bound(alone), abs=1e-6)
    assert tiered.reached == alone.reached


def test_cheaper_copies_give_higher_bounds(alone: Optimum):
    cheap, dear = best(0.5, (4.0, 1e-6)), best(0.5, (4.0, 1e-5))
    assert bound(alone) < bound(dear) < bound(cheap)
    for found in (cheap, dear):
        assert alone.reached < found.reached <= bound(found)
        assert found.reached < float(found.cached_tokens.sum()) / found.prompt_tokens


def test_copy_price_of_a_byte_is_its_time_in_tokens():
    geometry = ModelGeometry.preset("qwen3-next")
    host, disk = lower_budgets(geometry, (1 << 30, 50e9), (1 << 40, 5e9))
    state_tokens = geometry.state_bytes * host.tokens_per_byte
    assert 100 < state_tokens < 150
    assert disk.tokens_per_byte == pytest.approx(10 * host.tokens_per_byte)
    assert lower_budgets(geometry, (0, 50e9)) == ()


def test_command_line_writes_plans_with_tiers(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    output = tmp_path / "plans.jsonl"
    command = ["optimum", "--trace", "agent?head=20", "--gib", "0.5"]
    assert main([*command, "--host-gib", "4", "--output", str(output)]) == 0
    assert capsys.readouterr().out
    plan = json.loads(output.read_text())
    assert plan["lower"][0]["capacity_bytes"] == 4 * GIB and plan["method"] == "lp"


def test_method_milp_rejects_tiers():
    with pytest.raises(ValueError, match="method milp does not support tiers"):
        best(0.5, (1.0, 0.0), method="milp")
