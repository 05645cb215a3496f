"""Fleets in the laboratory: what a fleet of one is, what must hold whatever the router, what late
events and deaths do, and the command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest

from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.times import Roofline
from hybridcache.lab.cli import _parser, main
from hybridcache.lab.command.shared import opened
from hybridcache.lab.command.simulate import simulate_fleets
from hybridcache.lab.replicas.fleet import FleetConfig, Span, times_of
from hybridcache.lab.replicas.result import FleetResult, fleet_table
from hybridcache.lab.replicas.runs import FleetJob, fleet_jobs, run_fleet, run_fleets
from hybridcache.lab.replicas.serving import _Fleet
from hybridcache.lab.simulation.serving import Serving, serve
from hybridcache.lab.simulation.target import RunConfig, build_target
from hybridcache.lab.trace import Trace, TraceRequest
from hybridcache.lab.traces import open_trace
from hybridcache.routing.protocol import Choice, Router
from hybridcache.routing.registry import ROUTERS

GEOMETRY = ModelGeometry.preset("qwen3-next")
TIMES = Roofline.fitting(GEOMETRY)
SHORT = open_trace("short").kept()


def cell(router: str, trace: Trace = SHORT, gib: float = 1.0, **fleet: object) -> FleetResult:
    facts = {"replicas": 4, "load": 1.0} | fleet
    [job] = fleet_jobs(RunConfig(GEOMETRY), FleetConfig(**facts), TIMES, [router], [gib])
    return run_fleet(trace, job)


@pytest.mark.parametrize("router", [*ROUTERS, "oracle"])
def test_a_fleet_of_one_is_the_cache_alone(router: str) -> None:
    """Whatever the router: the same requests in the same order as in the concurrent mode."""
    one = cell(router, replicas=1, load=None)
    config = RunConfig(GEOMETRY, budget_bytes=1 << 30)
    log = serve(build_target(config, 1), SHORT, 1, Serving(TIMES, max_running=10_000))
    assert one.cached_tokens == sum(log.cached_tokens)
    assert one.ttft_mean_s == pytest.approx(np.mean(log.ttft_s))
    assert (one.imbalance, one.rerouted, one.broken) == (1.0, 0, 0)


def test_routers_in_the_order_that_they_should_have() -> None:
    rates = {word: cell(word, gib=3.0).token_hit_rate for word in (*ROUTERS, "oracle")}
    assert rates["round_robin"] < rates["session"] < rates["checkpoint"] - 0.05
    assert rates["kv-seconds"] <= rates["checkpoint"] and rates["kv"] <= rates["checkpoint"]
    assert rates["text"] - 0.01 <= rates["checkpoint"]


def test_perfect_news_promise_nothing_that_is_not_there() -> None:
    """With memory enough that nothing goes between the choice and the start of the prefill."""
    result = cell("checkpoint", gib=20.0)
    assert result.overpromised_tokens == 0
    assert cell("kv-seconds", gib=20.0).overpromised_tokens > 0


class Busiest(Router):
    """A deliberately bad one."""

    def choose(self, request, now):
        return Choice(max(self.loads, key=lambda each: self.loads[each].num_running))


def test_a_bad_router_is_seen_to_be_bad() -> None:
    word = "tests.lab.replicas.test_replicas:Busiest"
    bad, good = cell(word, gib=3.0), cell("checkpoint", gib=3.0)
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
def test_a_subclass_of_any_router_serves_as_the_router_does(
    router: str, fleet: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    subclass = type("Unchanged", (ROUTERS[router],), {"__module__": __name__})
    monkeypatch.setattr(sys.modules[__name__], "Unchanged", subclass, raising=False)
    mine = cell(f"{__name__}:Unchanged", **fleet).as_record()
    theirs = cell(router, **fleet).as_record()
    assert mine["fleet"].pop("router") != theirs["fleet"].pop("router")
    assert mine == theirs and mine["cached_tokens"]


@pytest.mark.parametrize("router", ["checkpoint", "text", "oracle", "session"])
@pytest.mark.parametrize("replicas", [1, 3])
def test_every_request_is_served_once_whatever_dies(
    router: str, replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the books of router and fleet agree after every change."""
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


def test_first_tokens_come_in_order_at_a_replica_and_late_events_only_cost() -> None:
    prompt, kept = cell("checkpoint", gib=3.0), cell("checkpoint", gib=3.0, delay_s=5.0)
    assert kept.token_hit_rate <= prompt.token_hit_rate + 0.02
    assert kept.token_hit_rate > cell("session", gib=3.0).token_hit_rate


def lone(*at: float) -> Trace:
    """One prompt of 128 tokens each time, by different people."""
    requests = [
        TraceRequest(
            when, number, None, np.arange(128, dtype=np.int32), np.arange(2, dtype=np.int32)
        )
        for number, when in enumerate(at)
    ]
    return Trace("lone", 1, tuple(requests).__iter__)


class Seconds:
    """Ten seconds a cold prompt of 128."""

    def seconds(self, start: int, end: int) -> float:
        return 10.0 * (end - start) / 128


def fleet_log(trace: Trace, **fleet: object):
    job = FleetJob(RunConfig(GEOMETRY, budget_bytes=1 << 32), FleetConfig(**fleet), Seconds())
    return run_fleet(trace, job)


def test_a_dead_replica_fails_over_before_the_first_token() -> None:
    """It dies at 5 s, in the middle of the prefill; the next one begins anew, and the clock goes
    on."""
    result = fleet_log(lone(0.0, 10.0), replicas=1, failures=1, replaced_s=2.0, tpot_s=0.0)
    assert (result.rerouted, result.broken) == (1, 0)
    assert result.ttft_s[99] == pytest.approx(17.0, abs=0.2)  # 5 lost, 2 alone, 10 of prefill


def test_past_the_first_token_it_is_broken_off() -> None:
    result = fleet_log(lone(0.0, 30.0), replicas=1, failures=1, tpot_s=100.0, replaced_s=1.0)
    assert (result.requests, result.rerouted, result.broken) == (2, 0, 1)


def test_a_load_makes_the_speed() -> None:
    span = Span.of(SHORT, 1, GEOMETRY)
    config = FleetConfig(replicas=4, load=0.5)
    times = times_of(config, span, GEOMETRY, TIMES)
    cold = sum(times.seconds(0, len(request.tokens)) for request in SHORT)
    assert cold == pytest.approx(0.5 * 4 * span.seconds)
    assert times_of(replace(config, load=None), span, GEOMETRY, TIMES) is TIMES


def test_a_sweep_resumes_and_processes_change_nothing(tmp_path) -> None:
    path = tmp_path / "runs.jsonl"
    jobs = fleet_jobs(RunConfig(GEOMETRY), FleetConfig(2), TIMES, ["session", "checkpoint"], [1.0])
    short = open_trace("short?head=30")
    first = run_fleets(short, jobs[:1], resume_from=path)
    path.write_text(path.read_text() + '{"key": "half')
    seen: list[tuple[int, int]] = []
    both = run_fleets(short, jobs, resume_from=path, progress=lambda *at: seen.append(at))
    assert both[0] == first[0] and seen == [(2, 2)]
    assert run_fleets(short, jobs) == both
    assert all(run.fleet.router in fleet_table(both) for run in both)


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    path = tmp_path / "runs.jsonl"
    arguments = ["simulate", "--trace", "short?head=40", "--gib", "2", "--replicas", "3"]
    more = ["--router", "session,kv,checkpoint", "--load", "1", "--event-delay", "2"]
    assert main([*arguments, *more, "--failures", "1", "--output", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "3 replicas of 2 GiB" in shown and "events 2 s late, 1 failures" in shown
    rows = [line.split()[0] for line in shown.splitlines() if line[:1].isalpha()][2:]
    assert rows == ["session", "kv", "checkpoint"]
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["fleet"]["router"] for record in kept] == rows


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--router", "kv"], "--router is about several replicas"),
        (["--replicas", "0"], "--replicas must be at least 1"),
        (["--replicas", "2", "--router", "best"], "router must be one of round_robin"),
        (["--replicas", "2", "--baseline", "vllm"], "--baseline has no meaning with --replicas"),
        *(
            (["--replicas", "2", flag, *value], f"{flag} has no meaning with --replicas")
            for flag, *value in (
                ("--no-bound",),
                ("--no-priority-classes",),
                ("--kv-share", "0.5"),
                ("--checkpoint-dtype", "int8"),
                ("--host-gib", "1"),
                ("--disk-gib", "1"),
                ("--host-gb-s", "50"),
                ("--disk-gb-s", "6"),
                ("--page", "p.html"),
            )
        ),
        (["--replicas", "2", "--load", "0"], "--load must be above 0"),
        (["--replicas", "2", "--ray", "x", "--processes", "2"], "name one"),
    ],
)
def test_bad_input(more: Iterable[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--trace", "short?head=5", "--gib", "1", *more]) == 2
    shown = capsys.readouterr().err
    assert sentence in shown and shown.count("\n") == 1


def test_every_flag_is_passed_on_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[str] = set()
    with monkeypatch.context() as patch:
        patch.setattr(
            argparse.Namespace,
            "__getattribute__",
            lambda self, name: read.add(name) or object.__getattribute__(self, name),
        )
        asked = ["simulate", "--trace", "short?head=5", "--gib", "1", "--replicas", "2"]
        options = _parser().parse_args(asked)
        read.clear()
        assert simulate_fleets(options, lambda spec: opened(spec, options)) == 0
    flags = set(vars(options)) - {"run", "goes_on"}
    assert len(flags) > 30 and flags <= read


def test_a_trace_without_time_has_no_load() -> None:
    with pytest.raises(ValueError, match="come at once"):
        cell("session", lone(1.0, 1.0))
    with pytest.raises(ValueError, match="no request"):
        cell("session", lone())
