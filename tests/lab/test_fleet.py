"""Tests of simulated fleets: a fleet of one, properties of all routers, late events, failures."""

from __future__ import annotations

import numpy as np
import pytest

from hybridcache.adapters.routing.protocol import Choice, Router, RouteRequest
from hybridcache.adapters.routing.registry import ROUTERS
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.times import Roofline
from hybridcache.lab.fleet import FleetConfig, FleetResult, _Fleet, run_fleet
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.simulation.serving import serve
from hybridcache.lab.simulation.target import build_target
from hybridcache.lab.trace import Trace
from hybridcache.lab.traces import open_trace

GEOMETRY = ModelGeometry.preset("qwen3-next")
TIMES = Roofline.fitting(GEOMETRY)
SHORT, AGENT = open_trace("short").kept(), open_trace("agent?head=60").kept()


def cell(router: str, trace: Trace = SHORT, gib: float = 1.0, **fleet: object) -> FleetResult:
    facts = {"replicas": 4, "load": 1.0} | fleet
    scenario = Scenario(trace, gib=gib, times=TIMES, host_gib=9.0)
    return run_fleet(trace, scenario, FleetConfig(router=router, **facts))


@pytest.mark.parametrize("router", list(ROUTERS))
def test_fleet_of_one_equals_a_single_cache(router: str) -> None:
    """With every router, requests have the hits and times of the simulator's concurrent mode."""
    one = cell(router, AGENT, replicas=1, load=None)
    alone = Scenario(AGENT, gib=1.0, times=TIMES, max_running=10_000, host_gib=9.0)
    log = serve(build_target(alone, 1), AGENT, 1, alone)
    assert one.cached_tokens == sum(log.cached_tokens) and sum(log.copy_s) > 0
    assert one.ttft_mean_s == pytest.approx(np.mean(log.ttft_s))
    assert one.rerouted == 0
    assert one.as_record()["token_hit_rate"] == one.token_hit_rate > 0


def test_wrong_fleets_are_refused() -> None:
    with pytest.raises(ValueError, match="must return a Choice of a replica"):
        cell("tests.lab.test_fleet:NoChoice")


class NoChoice(Router):
    """A router that chooses nothing."""

    def choose(self, request: RouteRequest, now: float) -> Choice:
        return None  # type: ignore[return-value]


@pytest.mark.parametrize("router", list(ROUTERS))
@pytest.mark.parametrize("replicas", [1, 3])
def test_each_request_is_served_once_despite_failures(
    router: str, replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counts of router and fleet agree after every event."""
    checked = []
    push = _Fleet.push

    def checking(self: _Fleet, when: float, change) -> None:
        def then(now: float) -> None:
            change(now)
            if len(checked) % 7 == 0:
                self.router.check()
            checked.append(now)
            assert set(self.router.loads) == set(self._replicas)
            waiting = sum(
                len(each.queue) + len(each.prefilling) for each in self._replicas.values()
            )
            assert sum(len(load.waiting) for load in self.router.loads.values()) == waiting

        push(self, when, then)

    monkeypatch.setattr(_Fleet, "push", checking)
    result = cell(router, replicas=replicas, failures=5, delay_s=3.0, replaced_s=10.0)
    assert result.requests == 120 and checked == sorted(checked)
    assert result.rerouted > 0
    assert 0 <= result.token_hit_rate < cell(router, replicas=replicas).token_hit_rate
