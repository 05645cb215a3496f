"""Tests of simulated fleets: a fleet of one, properties of all routers, late events, failures."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.times import Roofline
from hybridcache.lab.fleet import (
    FleetConfig,
    FleetJob,
    FleetResult,
    Span,
    _Fleet,
    run_fleet,
    times_of,
)
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.simulation.serving import serve
from hybridcache.lab.simulation.target import build_target
from hybridcache.lab.trace import Trace, TraceRequest
from hybridcache.lab.traces import open_trace
from hybridcache.routing.protocol import Choice, Router
from hybridcache.routing.registry import ROUTERS

GEOMETRY = ModelGeometry.preset("qwen3-next")
TIMES = Roofline.fitting(GEOMETRY)
SHORT = open_trace("short").kept()


def cell(router: str, trace: Trace = SHORT, gib: float = 1.0, **fleet: object) -> FleetResult:
    facts = {"replicas": 4, "load": 1.0} | fleet
    scenario = Scenario(trace, gib=gib, times=TIMES)
    return run_fleet(trace, FleetJob(scenario, FleetConfig(router=router, **facts)))


@pytest.mark.parametrize("router", list(ROUTERS))
def test_fleet_of_one_equals_a_single_cache(router: str) -> None:
    """With every router, requests have the hits and times of the simulator's concurrent mode."""
    one = cell(router, replicas=1, load=None)
    alone = Scenario(SHORT, gib=1.0, times=TIMES, max_running=10_000)
    log = serve(build_target(alone, 1), SHORT, 1, alone)
    assert one.cached_tokens == sum(log.cached_tokens)
    assert one.ttft_mean_s == pytest.approx(np.mean(log.ttft_s))
    assert (one.imbalance, one.rerouted, one.broken) == (1.0, 0, 0)


def test_routers_have_the_expected_order_of_hit_rates() -> None:
    rates = {router: cell(router, gib=3.0).token_hit_rate for router in ROUTERS}
    assert rates["least_loaded"] < rates["text"]
    assert rates["least_loaded"] < rates["checkpoint"] - 0.05
    assert rates["text"] - 0.01 <= rates["checkpoint"]


def test_immediate_events_cause_no_overpromised_tokens() -> None:
    """The memory is so large that nothing is evicted between routing and prefill."""
    result = cell("checkpoint", gib=20.0)
    assert result.overpromised_tokens == 0
    assert cell("text", gib=1.0).overpromised_tokens > 0, "it does not learn of evictions"


class BusiestReplica(Router):
    """Deliberately bad router, which chooses the busiest replica."""

    def choose(self, request, now):
        return Choice(max(self.loads, key=lambda each: self.loads[each].num_running))


def test_bad_router_gives_bad_figures() -> None:
    name = "tests.lab.test_fleet:BusiestReplica"
    bad, good = cell(name, gib=3.0), cell("checkpoint", gib=3.0)
    assert bad.imbalance > 2 > good.imbalance
    assert bad.ttft_mean_s > 3 * good.ttft_mean_s


@pytest.mark.parametrize("router", list(ROUTERS))
@pytest.mark.parametrize(
    "fleet",
    [
        {"gib": 1.0, "delay_s": 2.0, "failures": 3, "replaced_s": 10.0},
        {"gib": 3.0, "trace": open_trace("few-shot?head=80").kept()},
    ],
    ids=["late and failing", "perfect"],
)
def test_subclass_of_a_router_gives_the_same_results(
    router: str, fleet: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    subclass = type("Unchanged", (ROUTERS[router],), {"__module__": __name__})
    monkeypatch.setattr(sys.modules[__name__], "Unchanged", subclass, raising=False)
    found = cell(f"{__name__}:Unchanged", **fleet).as_record()
    expected = cell(router, **fleet).as_record()
    assert found["fleet"].pop("router") != expected["fleet"].pop("router")
    assert found == expected and found["cached_tokens"]


@pytest.mark.parametrize("router", list(ROUTERS))
@pytest.mark.parametrize("replicas", [1, 3])
def test_each_request_is_served_once_despite_failures(
    router: str, replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counts of router and fleet agree after every event."""
    checked = []
    push = _Fleet._push

    def checking(self: _Fleet, when: float, change) -> None:
        def then(now: float) -> None:
            change(now)
            if len(checked) % 7 == 0:
                self.router.check()
            checked.append(now)
            assert set(self.router.loads) == set(self._replicas)
            waiting = sum(
                len(each.queue) + (each.prefilling is not None) for each in self._replicas.values()
            )
            assert sum(load.num_waiting for load in self.router.loads.values()) == waiting

        push(self, when, then)

    monkeypatch.setattr(_Fleet, "_push", checking)
    result = cell(router, replicas=replicas, failures=5, delay_s=3.0, replaced_s=10.0)
    assert result.requests == 120 and checked == sorted(checked)
    assert result.rerouted > 0
    assert 0 <= result.token_hit_rate < cell(router, replicas=replicas).token_hit_rate


def test_late_events_reduce_hits_only_a_little() -> None:
    immediate, late = cell("checkpoint", gib=3.0), cell("checkpoint", gib=3.0, delay_s=5.0)
    assert late.token_hit_rate <= immediate.token_hit_rate + 0.02
    assert late.token_hit_rate > cell("least_loaded", gib=3.0).token_hit_rate


def equal_prompts(*at: float) -> Trace:
    """Return a trace with the same prompt of 128 tokens at each time, in different sessions."""
    requests = [
        TraceRequest(
            when, number, None, np.arange(128, dtype=np.int32), np.arange(2, dtype=np.int32)
        )
        for number, when in enumerate(at)
    ]
    return Trace("equal", 1, tuple(requests).__iter__)


class Seconds:
    """Prefill times: ten seconds for 128 tokens."""

    def seconds(self, start: int, end: int) -> float:
        return 10.0 * (end - start) / 128


def fleet_log(trace: Trace, tpot_s: float, **fleet: object):
    cell = Scenario(trace, gib=4.0, times=Seconds(), tpot_s=tpot_s)
    return run_fleet(trace, FleetJob(cell, FleetConfig(**fleet)))


def test_request_is_rerouted_if_its_replica_dies_before_the_first_token() -> None:
    """The replica dies at 5 s, during the prefill. Its replacement repeats the prefill, and TTFT
    includes the lost time."""
    result = fleet_log(equal_prompts(0.0, 10.0), replicas=1, failures=1, replaced_s=2.0, tpot_s=0.0)
    assert (result.rerouted, result.broken) == (1, 0)
    # 5 s are lost, 2 s pass until the replacement, the prefill takes 10 s.
    assert result.ttft_s[99] == pytest.approx(17.0, abs=0.2)


def test_request_is_broken_off_if_its_replica_dies_after_the_first_token() -> None:
    result = fleet_log(
        equal_prompts(0.0, 30.0), replicas=1, failures=1, tpot_s=100.0, replaced_s=1.0
    )
    assert (result.requests, result.rerouted, result.broken) == (2, 0, 1)


def test_load_scales_the_prefill_times() -> None:
    span = Span.of(SHORT, 1, GEOMETRY)
    config = FleetConfig(replicas=4, load=0.5)
    times = times_of(config, span, GEOMETRY, TIMES)
    cold = sum(times.seconds(0, len(request.tokens)) for request in SHORT)
    assert cold == pytest.approx(0.5 * 4 * span.seconds)
    assert times_of(replace(config, load=None), span, GEOMETRY, TIMES) is TIMES


def test_trace_without_duration_is_rejected() -> None:
    with pytest.raises(ValueError, match="come at once"):
        cell("least_loaded", equal_prompts(1.0, 1.0))
    with pytest.raises(ValueError, match="no request"):
        cell("least_loaded", equal_prompts())
