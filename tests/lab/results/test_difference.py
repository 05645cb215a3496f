"""Records of requests and evictions, differences of runs, and tables of results."""

from __future__ import annotations

import csv
import json
import sys
from functools import partial
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcache import Trace, TraceRequest, closed_loop, optimum, simulate
from hybridcache.lab.cli import main
from hybridcache.lab.results.figures import difference_figure
from hybridcache.lab.results.result import RunResult
from hybridcache.lab.runs.fleet import FleetConfig, run_fleet
from hybridcache.lab.runs.simulate import SimulationResult
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.traces.progress import shown_progress
from hybridcache.lab.traces.statistics import trace_stats
from tests.refused import refused

GIB = 0.5
"""Memory for two of the prompts of ``turns``, and not for three."""


def turns(order: str) -> Trace:
    """Return a trace with a request of 4,000 tokens per letter: the same letter, the same text."""
    requests = []
    for number, letter in enumerate(order):
        prompt = np.arange(4000, dtype=np.int32) + 10_000 * ord(letter)
        requests.append(TraceRequest(float(number), letter, None, prompt, prompt[:100]))
    return Trace("turns", 1, requests.__iter__)


@pytest.fixture(scope="module")
def sweep() -> SimulationResult:
    settings = {"gib": [1, 3], "policy": ["survival", "lru"], "baseline": "vllm"}
    return simulate("chat?head=120", by_request=True, **settings)


def test_records_sum_to_the_figures_of_their_run(sweep: SimulationResult) -> None:
    for run in sweep:
        assert run.by_request is not None and len(run.by_request) == run.requests
        assert sum(one.cached_tokens for one in run.by_request) == run.cached_tokens
        mean = sum(one.ttft_s for one in run.by_request) / run.requests
        assert mean == pytest.approx(run.ttft_mean_s)
        assert any(one.lost for one in run.by_request) == (not run.config["baseline"])
        assert (run.evictions is None) == bool(run.config["baseline"])
        assert RunResult.from_record(json.loads(json.dumps(run.as_record()))) == run
    plain = simulate("chat?head=120", gib=1, policy="lru")
    assert plain.runs[0].by_request is None is plain.runs[0].evictions
    assert plain.runs[0].cached_tokens == sweep.by_label()["lru"][0].cached_tokens


def test_an_eviction_and_the_request_that_misses_it_name_each_other() -> None:
    equal = simulate(turns("ABCA"), gib=4, policy=["lru", "fifo"])
    assert "more than" not in equal.verdict(), "three sessions have no interval"
    small, ample = simulate(turns("ABCA"), gib=[GIB, 4], policy="lru", by_request=True)
    assert [one.lost_age for one in small.by_request] == [0, 0, 0, 1]
    evicted = [one for one in small.evictions if one.kind == "checkpoint" and one.missed]
    (missed,) = [one for one in evicted if one.label == small.by_request[3].lost]
    assert (missed.request, missed.missed, missed.uses) == (3, 4, 0)
    (row,) = ample.compare(small).to_dicts()
    assert row["request"] == 4 and row["tokens"] == ample.cached_tokens > 3900
    assert row["reason"] == f"evicted {missed.label}, never used" and row["lost_age"] == 1
    table = ample.compare(small).table()
    assert table.startswith("lru at 4 GiB less lru at 0.5 GiB: +")
    assert f"lru at 0.5 GiB: evicted {missed.label}, never used" in table
    turn = ample.compare(small).table("generation")
    assert row["generation"] == 1 and "lru at 0.5 GiB: generation 1" in turn
    title = small.compare(optimum(turns("ABCA"), gib=1)[0]).title
    assert title.startswith("lru at 0.5 GiB less best plan at 1 GiB: ")
    refused("by must be one of request, session, gen", ample.compare(small).table, "turn")
    (back,) = small.compare(ample).to_dicts()
    assert back == row | {"tokens": -row["tokens"]}


@settings(max_examples=8)
@given(st.text("ABCDE", min_size=3, max_size=14))
def test_a_difference_sums_to_that_of_the_hits(order: str) -> None:
    trace = turns(order)
    found = simulate(trace, gib=[GIB, 1.2], policy=["lru", "fifo"], by_request=True)
    plan = optimum(trace, gib=GIB)[0]
    for run, other in product(found, (*found, plan)):
        won = run.cached_tokens - int(np.sum(other.cached_tokens))
        assert sum(row["tokens"] for row in run.compare(other).to_dicts()) == won


def test_a_plan_says_what_it_keeps_and_a_rebuilt_system_nothing(sweep: SimulationResult) -> None:
    run, peer = sweep.by_label()["lru"][0], sweep.by_label()["vllm (rebuilt)"][0]
    plan = optimum("chat?head=120", gib=1)[0]
    assert "lru: evicted decode" in run.compare(plan).table()
    reasons = {row["reason"] for row in run.compare(peer).to_dicts() if row["tokens"] > 0}
    assert reasons == {"not told"}
    other = simulate("chat?head=119", gib=1, policy="lru", by_request=True).runs[0]
    without = simulate("chat?head=120", gib=1, policy="lru").runs[0]
    for wrong in (other, without, optimum("chat?head=119", gib=1)[0]):
        refused("no records of the same requests: simulate both", run.compare, wrong)
    difference = sweep.by_label()["survival"][0].compare(run)
    figure = difference_figure(difference)
    black = figure.axes[0].lines[-2].get_ydata()
    share = run.token_hit_rate - sweep.by_label()["survival"][0].token_hit_rate
    assert black[-1] == pytest.approx(-100 * share)


def test_figures_of_each_seed_are_kept() -> None:
    more = {"seeds": 3, "by_request": True, "host_gib": 1}
    merged = simulate("chat?head=60", gib=1, policy="lru", **more).runs[0]
    tiers = merged.tier_bytes
    assert tiers and tiers == {
        name: sum(run.tier_bytes[name] for run in merged.draws) for name in tiers
    }
    assert len(merged.draws) == 3 and merged.by_request is None
    assert sum(run.cached_tokens for run in merged.draws) == merged.cached_tokens
    refused(r"one seed .of several: run.draws.i", merged.compare, merged)


def test_every_result_is_a_frame(sweep: SimulationResult, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=list))
    run, other = sweep.by_label()["survival"][0], sweep.by_label()["lru"][0]
    loop = closed_loop("short?head=20", gib=1, rate=4, admission="oldest")
    plans, trace = optimum("short?head=20", gib=[1, 2]), turns("ABA")
    fleet = run_fleet(trace, Scenario(trace, gib=1.0), FleetConfig(replicas=2))
    results = sweep, loop, plans, trace, run.compare(other), fleet, trace_stats(trace)
    for result in results:
        assert result.to_frame() == result.to_dicts() and result.to_dicts()
        assert not any(isinstance(one, dict) for row in result.to_dicts() for one in row.values())
    assert trace.to_dicts()[0]["prompt_tokens"] == 4000 and len(plans.to_dicts()) == 2
    monkeypatch.setitem(sys.modules, "pandas", None)
    missing = partial(refused, kind=ModuleNotFoundError)
    for result in results:
        missing("to_frame needs pandas: pip install pandas", result.to_frame)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    difference = partial(difference_figure, run.compare(other))
    for draw in (sweep.figure, sweep.losses_figure, loop.figure, difference):
        missing(r"matplotlib is not installed: pip install .*\[lab\]", draw)


def test_runs_are_a_sequence_with_labels(sweep: SimulationResult) -> None:
    assert len(sweep) == len(sweep.runs) == len([*sweep])
    assert sweep[0] is sweep.runs[0] and sweep[-2:] == sweep.runs[-2:]
    assert {label: sweep[label] for label in sweep.by_label()} == sweep.by_label()
    refused("no run is labelled 'lruu'.*lru", lambda: sweep["lruu"], kind=KeyError)


def test_labels_stay_apart(sweep: SimulationResult) -> None:
    assert next(iter(sweep.labelled({"survival": "ours"}))).label == "ours"
    loop = closed_loop("short?head=9", gib=1, rate=4, policy=["lru", "survival"])
    assert loop.labelled({"sessions": "ours"}).runs[1].admission == "ours"
    assert "equal, with one order of admission: oldest and sessions at 4 sessions/s" in loop.table()
    for result in (sweep, loop):
        swapped = result.labelled({"lru": "survival", "survival": "lru"})
        assert {run.label for run in swapped} == {run.label for run in result}
        for names, said in (
            ({"lru": "x", "survival": "x"}, "2 competitors would be labelled 'x'"),
            ({"survival": "lru"}, "2 competitors would be labelled 'lru'"),
            ({"nosuch": "x"}, "'nosuch'; known: .*lru"),
            ({"LRU": "x"}, "no run is labelled 'LRU', did you mean 'lru'"),
        ):
            refused(said, result.labelled, names)


def test_the_command_writes_requests_and_compares_the_first_policy(tmp_path, capsys) -> None:
    path = tmp_path / "folder" / "requests.csv"
    command = ["simulate", "--trace", "short?head=30", "--gib", "0.5", "--policy", "lru,fifo"]
    assert main([*command, "--requests", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "lru less fifo at 0.5 GiB: " in printed and f"requests: {path}" in printed
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 60 and {row["run"] for row in rows} == {"lru", "fifo"}
    assert main([*command, "--seeds", "2", "--requests", str(path)]) == 0
    assert "no differences by request: each draw has other requests;" in capsys.readouterr().out
    with path.open(newline="") as file:
        assert len({row["trace"].partition("&")[0] for row in csv.DictReader(file)}) == 2


def test_a_notebook_has_progress_and_needs_a_file_for_other_processes(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(turns=turns))
    monkeypatch.setattr(turns, "__module__", "__main__")
    trace = Trace("own", 1, partial(turns, "AB"))
    with pytest.raises(ValueError, match="defined in this notebook, which other processes cannot"):
        simulate(trace, gib=[1, 2], policy="lru", processes=2)
    monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    with shown_progress(None, "runs", "chat") as show:
        show.__closure__[0].cell_contents.delay = 0
        show(1, 2)
    assert "chat: " in capsys.readouterr().err
