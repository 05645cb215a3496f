"""Tests of simulated fleets: a fleet of one, properties of all routers, late events, failures."""

from __future__ import annotations

import numpy as np
import pytest

from hybridcache.adapters.routing.protocol import Choice, Router, RouteRequest
from hybridcache.adapters.routing.registry import ROUTERS
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.times import Roofline
from hybridcache.lab.runs.fleet import TPOT_S, Fleet, FleetConfig, FleetResult, run_fleet
from hybridcache.lab.runs.serving import serve
from hybridcache.lab.runs.target import build_target
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.traces import open_trace
from hybridcache.lab.traces.trace import Trace, TraceRequest
from tests.lab.runs.test_simulate import Seconds
from tests.refused import refused

GEOMETRY = ModelGeometry.preset("qwen3-next")
RIVALS = ["TwoChoices", "PrefixAffinity", "StatesAndWait", "BlocksAndWait", "Blind"]
ALL = [*ROUTERS, *(f"hybridcache.lab.rivals.routers:{name}" for name in RIVALS)]
TIMES = Roofline.fitting(GEOMETRY)
SHORT, AGENT = open_trace("short").kept(), open_trace("agent?head=60").kept()


def cell(router: str, trace: Trace = SHORT, gib: float = 1.0, **fleet: object) -> FleetResult:
    facts = {"replicas": 4, "load": 1.0} | fleet
    scenario = Scenario(trace, gib=gib, times=TIMES, host_gib=9.0)
    return run_fleet(trace, scenario, FleetConfig(router=router, **facts))


@pytest.mark.parametrize("router", ALL)
def test_fleet_of_one_equals_a_single_cache(router: str) -> None:
    """With every router, requests that do not overlap have the hits and times of those served in
    turn."""
    apart = [one._replace(timestamp_s=100.0 * number) for number, one in enumerate(AGENT)]
    trace = Trace("apart", 1, lambda: apart)
    one = cell(router, trace, replicas=1, load=None)
    alone = Scenario(trace, gib=1.0, times=TIMES, host_gib=9.0)
    log = serve(build_target(alone, 1), trace, 1, alone)
    assert one.cached_tokens == sum(log.cached_tokens) and sum(log.copy_s) > 0
    assert one.ttft_mean_s == pytest.approx(np.mean(log.ttft_s))
    assert one.rerouted == 0 < one.token_hit_rate == one.as_record()["token_hit_rate"]


@pytest.mark.parametrize(
    "given",
    [{"gib": (1.0, 2.0)}, {"gib": None}, {"policy": "lru,fifo"}, {"baseline": "vllm"}, {"head": 0}],
)
def test_a_fleet_has_one_policy_and_size_and_a_request(given: dict[str, object]) -> None:
    trace, words = (
        SHORT.head(given.pop("head", 1)),
        "a fleet needs one policy .* at one size|no req",
    )
    refused(words, run_fleet, trace, Scenario(trace, **{"gib": 1.0} | given), FleetConfig())
    assert run_fleet("short?head=9", Scenario("short", gib=1.0), FleetConfig()).requests == 9


def test_next_turn_starts_after_the_answer_of_the_previous_one() -> None:
    tokens = np.arange(70, dtype=np.int32)
    requests = [
        TraceRequest(when, session, None, tokens, tokens[:50])
        for when, session in ((0.0, "a"), (1.0, "a"), (2.0, "b"), (100.0, "a"))
    ]
    config, times = FleetConfig(replicas=1, router="least_loaded"), Seconds()
    loop = Fleet(Scenario("short", gib=1.0), GEOMETRY, 1, config, times)
    loop.run(requests)
    # Starts: first of a at 0, b at 10, second of a at 20 (first answered at 11), last at 100.
    assert TPOT_S == 0.02 and list(loop.log.arrival_s) == [0.0, 2.0, 1.0, 100.0]
    assert list(loop.log.ttft_s) == [10.0, 18.0, 19.0, 10.0]


def test_wrong_fleets_are_refused() -> None:
    refused("must return a Choice of a replica", cell, "tests.lab.runs.test_fleet:NoChoice")


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
    push = Fleet.push

    def checking(self: Fleet, when: float, change) -> None:
        def then(now: float) -> None:
            change(now)
            if len(checked) % 7 == 0:
                self.router.check()
            checked.append(now)
            assert set(self.router.loads) == set(self.replicas)
            waiting = sum(
                len(each.queue) + (each.prefilling is not None) for each in self.replicas.values()
            )
            assert sum(len(load.waiting) for load in self.router.loads.values()) == waiting

        push(self, when, then)

    monkeypatch.setattr(Fleet, "push", checking)
    result = cell(router, replicas=replicas, failures=5, delay_s=3.0, replaced_s=10.0)
    assert result.requests == 120 and checked == sorted(checked)
    assert result.rerouted > 0
    assert 0 <= result.token_hit_rate < cell(router, replicas=replicas).token_hit_rate
