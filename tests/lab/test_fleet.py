"""Tests of simulated fleets: a fleet of one, properties of all routers, late events, failures, and
the command line."""

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


@pytest.mark.parametrize("router", list(ROUTERS))
def test_fleet_of_one_equals_a_single_cache(router: str) -> None:
    """With every router, requests have the hits and times of the simulator's concurrent mode."""
    one = cell(router, replicas=1, load=None)
    config = RunConfig(GEOMETRY, budget_bytes=1 << 30)
    log = serve(build_target(config, 1), SHORT, 1, Serving(TIMES, max_running=10_000))
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
    name = "tests.lab.replicas.test_replicas:BusiestReplica"
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


def fleet_log(trace: Trace, **fleet: object):
    job = FleetJob(RunConfig(GEOMETRY, budget_bytes=1 << 32), FleetConfig(**fleet), Seconds())
    return run_fleet(trace, job)


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


def test_sweep_of_fleets_resumes(tmp_path) -> None:
    path = tmp_path / "runs.jsonl"
    jobs = fleet_jobs(RunConfig(GEOMETRY), FleetConfig(2), TIMES, ["text", "checkpoint"], [1.0])
    short = open_trace("short?head=30")
    first = run_fleets(short, jobs[:1], resume_from=path)
    path.write_text(path.read_text() + '{"key": "half')
    seen: list[tuple[int, int]] = []
    both = run_fleets(short, jobs, resume_from=path, progress=lambda *at: seen.append(at))
    assert both[0] == first[0] and seen == [(2, 2)]
    assert run_fleets(short, jobs) == both
    assert all(run.fleet.router in fleet_table(both) for run in both)


def test_command_prints_a_table_and_writes_lines(
    capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    path = tmp_path / "runs.jsonl"
    arguments = ["simulate", "--trace", "short?head=40", "--gib", "2", "--replicas", "3"]
    more = ["--router", "text,least_loaded,checkpoint", "--load", "1", "--event-delay", "2"]
    assert main([*arguments, *more, "--failures", "1", "--output", str(path)]) == 0
    out = capsys.readouterr().out
    assert "3 replicas of 2 GiB" in out and "events 2 s late, 1 failures" in out
    rows = [line.split()[0] for line in out.splitlines() if line[:1].isalpha()][2:]
    assert rows == ["text", "least_loaded", "checkpoint"]
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["fleet"]["router"] for record in records] == rows


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--router", "text"], "--router is about several replicas"),
        (["--replicas", "0"], "replicas must be at least 1"),
        (["--replicas", "2", "--router", "best"], "router must be one of checkpoint"),
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
            )
        ),
        (["--replicas", "2", "--load", "0"], "load must be above 0"),
        (["--replicas", "2", "--ray", "x", "--processes", "2"], "give one of them"),
    ],
)
def test_invalid_arguments_give_one_line(
    more: Iterable[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "--trace", "short?head=5", "--gib", "1", *more]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_fleets_use_or_reject_every_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[str] = set()
    with monkeypatch.context() as patch:
        patch.setattr(
            argparse.Namespace,
            "__getattribute__",
            lambda self, name: read.add(name) or object.__getattribute__(self, name),
        )
        arguments = ["simulate", "--trace", "short?head=5", "--gib", "1", "--replicas", "2"]
        options = _parser().parse_args(arguments)
        read.clear()
        assert options.run(options) == 0
    flags = set(vars(options)) - {"run", "goes_on", "parser", "gib"}
    assert len(flags) > 20 and flags <= read


def test_trace_without_duration_is_rejected() -> None:
    with pytest.raises(ValueError, match="come at once"):
        cell("least_loaded", equal_prompts(1.0, 1.0))
    with pytest.raises(ValueError, match="no request"):
        cell("least_loaded", equal_prompts())
