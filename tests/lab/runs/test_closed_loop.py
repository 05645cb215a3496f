"""Tests of closed-loop simulation: the simulator against the engine, and the shared planner with a
random admission policy."""

from __future__ import annotations

import heapq
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import Engine, EngineConfig, RequestSpec, SamplingParams
from engine.config import BUILTIN_DIR
from engine.weights.model_config import read_config
from experiments.studies.admission import LinearSteps
from hybridcache import CacheConfig, build_prefix_cache
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.units import GIB
from hybridcache.lab.results.figures import closed_loop_figure
from hybridcache.lab.runs.closed_loop import (
    LoopRun,
    closed_loop,
    run_closed_loop,
    simulate_closed_loop,
)
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.traces.intervals import paired
from hybridcache.lab.traces.trace import Trace, TraceRequest
from hybridcache.policies.registry import DEFAULT_EVICTION, DEFAULT_PLACEMENT, parse_placement
from hybridcache.radix.cache import HybridRadixCache
from hybridcache.scheduling.cache_manager import CacheManager
from hybridcache.scheduling.planner import StepPlanner
from hybridcache.scheduling.request import (
    AdmissionPolicy,
    ScheduledRequest,
    ServerLoad,
    WaitingRequest,
)
from tests.oracle import OracleRunner, OracleSampler
from tests.radix.twins import VictimLog

VOCABULARY = 320
TIMES = LinearSteps()


# --- the planner, with a random policy ------------------------------------------------------------


class RandomPolicy(AdmissionPolicy):
    """Policy that admits and withholds at random, and checks the calls that it gets."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.seen: dict[WaitingRequest, int] = {}
        """Number of admissions of each waiting or running request."""
        self.passes: Counter[WaitingRequest] = Counter()
        """Number of newer requests that were admitted before a request."""
        self.withheld: set[WaitingRequest] = set()

    def arrived(self, request: WaitingRequest, load: ServerLoad) -> None:
        assert request not in self.seen
        assert request.session in load.open_sessions
        self.seen[request] = 0

    def order(
        self, waiting: Sequence[WaitingRequest], load: ServerLoad
    ) -> Iterable[WaitingRequest]:
        assert [r.arrival for r in waiting] == sorted(r.arrival for r in waiting)
        assert set(waiting) == {r for r in self.seen if not r.is_running}
        assert all(r.num_passes >= self.passes[r] for r in waiting)
        chosen = self.dice.sample(list(waiting), self.dice.randint(0, len(waiting)))
        self.withheld = set(waiting) - set(chosen)
        self.wakes_at_s = load.now_s + 0.05 if self.withheld and self.dice.random() < 0.5 else None
        if chosen:
            assert load.cached_len(chosen[0]) <= chosen[0].num_tokens
        return chosen

    def admitted(self, request: Any, load: ServerLoad) -> None:
        assert request.is_running and request.num_preemptions == self.seen[request]
        assert request not in self.withheld or self.wakes_at_s is None or load.running
        self.seen[request] += 1
        older = (r for r in self.seen if not r.is_running and r.arrival < request.arrival)
        self.passes.update(older)

    def left(self, request: WaitingRequest, load: ServerLoad) -> None:
        del self.seen[request]


def random_load(seed: int) -> Trace:
    """Return 12 sessions of three turns with long answers. Every fourth has another tenant."""
    rng, requests = np.random.default_rng(seed), []
    for session in range(12):
        text = np.empty(0, np.int32)
        for turn in range(3):
            asked, answer = (
                rng.integers(0, 50, int(rng.integers(20, most)), dtype=np.int32)
                for most in (300, 200)
            )
            text = np.concatenate((text, asked))
            tenant = None if session % 4 else "b"
            requests.append(TraceRequest(0.2 * turn, session, tenant, text, answer))
            text = np.concatenate((text, answer))
    return Trace("random", 1, tuple(requests).__iter__)


@pytest.mark.parametrize("seed", range(4))
def test_a_random_policy_gets_every_call_and_withholds_no_request_for_ever(seed: int) -> None:
    made: list[RandomPolicy] = []

    class Seeded(RandomPolicy):
        def __init__(self) -> None:
            super().__init__(seed)
            made.append(self)

    cell = small_cell(0.6, 20.0, max_running=4, admission=Seeded, tells_ends=seed % 2 == 0)
    table = simulate_closed_loop(random_load(seed), cell)
    assert len(table.answered) + table.num_refused > 30
    assert sum(one.num_preemptions for one in table.answered) > 0
    assert not made[-1].seen and sum(made[-1].passes.values()) > 30


def test_text_that_a_tier_can_load_counts_as_cached_for_admission() -> None:
    sizes = {"num_kv_tokens": 400, "num_slots": 8}
    bytes_each = {"kv_bytes_per_token": 4, "state_bytes": 64, "host_bytes": 100_000}
    cache = build_prefix_cache(CacheConfig(**sizes, **bytes_each))
    manager = CacheManager(cache, parse_placement("backoff"), num_rows=2, stateful=True)
    found: list[int] = []

    class Looks(AdmissionPolicy):
        def order(
            self, waiting: Sequence[WaitingRequest], load: ServerLoad
        ) -> Iterable[WaitingRequest]:
            found.append(load.cached_len(waiting[0]))
            return waiting

    planner: StepPlanner[ScheduledRequest] = StepPlanner(
        manager, max_running=1, token_budget=512, admission=Looks(), clock=lambda: 0.0
    )
    for number in (0, 1, 2, 0):
        prompt = np.arange(260, dtype=np.int32) + 1000 * number
        spec = RequestSpec(prompt, request_id="one")
        request = ScheduledRequest(spec, prompt, arrival=len(found), arrival_s=0.0, max_len=261)
        planner.add(request)
        while request.computed_len < 260:
            for one, end in planner.choose().items():
                assert planner.take_checkpoint_slots(one, end) is not None
                manager.take_step().done()
                planner.advance(one, end)
        planner.leave(request)
    assert request.cached_len == 0 and found[0] == 0 and found[-1] == 256
    planner.add(request := ScheduledRequest(spec, prompt, arrival=9, arrival_s=0.0, max_len=261))
    planner.choose()
    assert request.is_running
    planner.remove(request)  # a running request is aborted
    assert not planner.has_work()
    planner.check()
    cache.check(*manager.held())


# --- simulator and engine -------------------------------------------------------------------------


class VirtualRunner(OracleRunner):
    """Runner with a virtual clock, which ``TIMES`` advances."""

    now_s = 0.0

    def forward(self, batch: Any, drawn: Sequence[int] = ()) -> Any:
        logits = super().forward(batch, drawn)
        chunks = [(s.start, s.start + len(s.token_ids)) for s in batch.segments if not s.is_decode]
        contexts = [s.start + len(s.token_ids) for s in batch.segments if s.is_decode]
        if batch.segments:
            self.now_s += TIMES.step_seconds(chunks, len(contexts), sum(contexts))
        return logits


Turn = tuple[np.ndarray, int, float, str | None]


def script(rng: np.random.Generator, num_sessions: int) -> list[list[Turn]]:
    """Return sessions of (new tokens, length of the answer, pause before it, tenant)."""
    heads = [rng.integers(0, VOCABULARY, 150, dtype=np.int32) for _ in range(2)]
    sessions = []
    for number in range(num_sessions):
        turns: list[Turn] = []
        for turn in range(int(rng.integers(1, 7))):
            new_tokens = rng.integers(0, VOCABULARY, int(rng.integers(20, 400)), dtype=np.int32)
            if not turn:
                new_tokens = np.concatenate((heads[number % 2], new_tokens))
            answer, pause_s = int(rng.integers(1, 90)), float(rng.exponential(1.0))
            turns.append((new_tokens, answer, pause_s, None if number % 5 else "b"))
        sessions.append(turns)
    return sessions


RequestResult = tuple[int, int, int, float, int]
"""(session, turn, cached tokens, end time, preemptions) of a request."""


def serve(
    engine: Engine, sessions: list[list[Turn]], rate: float, seed: int
) -> tuple[list[RequestResult], Trace, bool]:
    """Serve the sessions on the virtual clock. Return the results in order of their ends, the
    trace, and whether the policy withheld requests."""
    withheld = 0.0
    runner: Any = engine.runner
    rng = np.random.default_rng(seed)
    starts = np.cumsum(rng.exponential(1 / rate, len(sessions))).tolist()
    events = [(start_s, i + 1, i) for i, start_s in enumerate(starts)]
    heapq.heapify(events)
    num_events, turns = len(events), [0] * len(sessions)
    texts: dict[int, np.ndarray] = {}
    live: dict[str, int] = {}
    lines: list[RequestResult] = []
    served: dict[tuple[int, int], TraceRequest] = {}
    while events or engine.has_work():
        while events and events[0][0] <= runner.now_s:
            _, _, i = heapq.heappop(events)
            new_tokens, answer, _, tenant = sessions[i][turns[i]]
            prompt = np.concatenate((texts.get(i, new_tokens[:0]), new_tokens))
            rule = SamplingParams(max_tokens=answer, ignore_eos=True, temperature=0.0)
            live[engine.submit(prompt, rule, namespace=tenant)] = i
        if not engine.has_work():
            runner.now_s = events[0][0]
            continue
        num_steps = runner.num_steps
        outputs = engine.step()
        report = engine._scheduler.admission.report()
        withheld += float(report.get("withheld_requests", 0))
        if runner.num_steps == num_steps and not outputs:
            wakes_at_s = engine._scheduler.wakes_at_s
            times = [t for t in (wakes_at_s, events[0][0] if events else None) if t is not None]
            runner.now_s = max(runner.now_s, min(times))
        for output in outputs:
            if output.finish_reason is None:
                continue
            i = live.pop(output.request_id)
            prompt = np.asarray(output.prompt_token_ids, np.int32)
            answered = np.asarray(output.token_ids, np.int32)
            lines.append((i, turns[i], output.cached_len, runner.now_s, output.num_preemptions))
            tenant, pause_s = sessions[i][turns[i]][3], sessions[i][turns[i]][2]
            time_s = served[i, turns[i] - 1].timestamp_s + pause_s if turns[i] else 0.0
            served[i, turns[i]] = TraceRequest(
                time_s, i, tenant, prompt, answered, stop_reason="length"
            )
            texts[i] = np.concatenate((prompt, answered))
            turns[i] += 1
            if turns[i] < len(sessions[i]):
                num_events += 1
                when_s = runner.now_s + sessions[i][turns[i]][2]
                heapq.heappush(events, (when_s, num_events, i))
    ordered = tuple(served[key] for key in sorted(served))
    return lines, Trace("script", 1, ordered.__iter__), withheld > 0


def lines_of(table: LoopRun) -> Iterator[RequestResult]:
    for one in table.answered:
        yield one.place, one.turn, one.cached_len, one.finished_s, one.num_preemptions


@pytest.fixture
def evictions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, int]]]:
    """Evictions of all caches in order: (kind, position, serial of the item)."""
    found: list[tuple[str, int, int]] = []
    make = HybridRadixCache.__init__

    class Log(VictimLog):
        def chosen(self, item: Any) -> None:
            found.append((item.kind, item.position, item.serial))

    def make_watched(cache: HybridRadixCache, *arguments: Any, **options: Any) -> None:
        make(cache, *arguments, **options)
        Log(cache)

    monkeypatch.setattr(HybridRadixCache, "__init__", make_watched)
    yield found


@pytest.mark.full(
    *("survival-cached-first-2600-4", "lru-oldest-2500-6", "sieve-live:3-2600-4"),
    *("lhd-oldest-2600-4", "marconi-sessions-2500-6", "survival-strict sessions-2600-4"),
)
@pytest.mark.parametrize(
    ("policy", "admission", "num_rows", "max_running"),
    [
        ("survival", "oldest", 3000, 4),
        ("lru", "oldest", 2500, 6),
        ("survival", "cached-first", 2600, 4),
        ("fifo", "longest-match", 2500, 6),
        ("sieve", "live:3", 2600, 4),
        ("gdsf", "oldest", 2500, 6),
        ("lhd", "oldest", 2600, 4),
        ("marconi", "sessions", 2500, 6),
        ("survival", "strict sessions", 2600, 4),
    ],
)
def test_simulator_and_engine_agree_on_admissions_evictions_and_hits(
    policy: str,
    admission: str,
    num_rows: int,
    max_running: int,
    evictions: list[tuple[str, int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both serve the same requests, the engine with the oracle runner and in virtual time. Requests
    end in the same order, at the same times, with the same cached tokens and preemptions, and the
    same items are evicted in the same order."""
    page_size = 16 if policy in ("lhd", "lru") else 1
    checkpoints = "adaptive" if policy == "survival" else "branch,boundary,backoff,every:256,end"
    if is_strict := admission == "strict sessions":
        admission = "sessions"
        for name, value in (("CREDIT_S", 0.0), ("FLOOR", 0.01), ("LEAST_WORTH", 0.0)):
            monkeypatch.setattr(f"hybridcache.policies.admission.{name}", value)
    seed, rate = 3, 2.0
    sessions = script(np.random.default_rng(seed), 14)
    geometry = ModelGeometry.from_config(read_config(BUILTIN_DIR) | {"head_dim": 128})
    sizes = {"geometry": geometry, "page_size": page_size}
    runner = VirtualRunner(num_rows, None, vocab_size=VOCABULARY, **sizes)
    config = EngineConfig(
        page_size=page_size,
        admission=admission,
        max_running=max_running,
        token_budget=256,
        eviction=policy,
        checkpoints=tuple(checkpoints.split(",")),
        overlap="off",
    )
    engine = Engine(
        config, runner=runner, sampler=OracleSampler(VOCABULARY), clock=lambda: runner.now_s
    )
    lines, trace, has_withheld = serve(engine, sessions, rate, seed)
    cell = Scenario(
        trace,
        model=geometry,
        gib=runner.memory.total_bytes / GIB,
        page_size=page_size,
        policy=policy,
        checkpoints=checkpoints,
        times=TIMES,
        rate=rate,
        seeds=(seed,),
        max_running=max_running,
        token_budget=256,
        admission=admission,
    )
    by_engine = list(evictions)
    evictions.clear()
    table = simulate_closed_loop(trace, cell)
    assert len(lines) > 30 and evictions == by_engine and len(by_engine) > 8
    assert has_withheld or not is_strict
    assert engine.report().usage["evicted_tokens"] > 0
    for found, expected in zip(lines_of(table), lines, strict=True):
        assert found[:3] == expected[:3]
        assert found[3] == pytest.approx(expected[3], abs=1e-6)
        assert found[4] == expected[4]


# --- figures of runs ------------------------------------------------------------------------------


def small_load(num_sessions: int, turns: int, pause_s: float) -> Trace:
    """Return sessions of 900 tokens and 60 more per turn."""
    rng, requests = np.random.default_rng(7), []
    for session in range(num_sessions):
        text = rng.integers(0, 1000, 900, dtype=np.int32)
        for turn in range(turns):
            text = np.concatenate((text, rng.integers(0, 1000, 40, dtype=np.int32)))
            answer = rng.integers(0, 1000, 20, dtype=np.int32)
            requests.append(TraceRequest(pause_s * turn, session, None, text, answer))
            text = np.concatenate((text, answer))
    return Trace("small", 1, tuple(requests).__iter__)


def small_cell(num_sessions_that_fit: float, rate: float, **settings: Any) -> Scenario:
    """Return a cell whose memory holds that many sessions of ``small_load``."""
    geometry = ModelGeometry.from_config(read_config(BUILTIN_DIR) | {"head_dim": 128})
    gib = num_sessions_that_fit * 2200 * geometry.kv_bytes_per_token / GIB
    settings = {"times": TIMES, "admission": "sessions", "seeds": (0,)} | settings
    return Scenario("small", model=geometry, gib=gib, rate=rate, **settings)


def test_without_a_prefix_cache_sessions_admits_as_oldest_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A cache that stores nothing evicts nothing, so no turn can lose its text."""
    for name, value in (("CREDIT_S", 0.0), ("FLOOR", 0.01), ("LEAST_WORTH", 0.0)):
        monkeypatch.setattr(f"hybridcache.policies.admission.{name}", value)
    served = []
    for admission in ("oldest", "sessions"):
        runner = VirtualRunner(5000, 20, vocab_size=VOCABULARY, max_model_len=3000)
        settings = {"prefix_cache": "none", "max_running": 4, "token_budget": 256}
        engine = Engine(
            EngineConfig(admission=admission, **settings),
            runner=runner,
            sampler=OracleSampler(VOCABULARY),
            clock=lambda: runner.now_s,  # noqa: B023
        )
        served.append(serve(engine, script(np.random.default_rng(3), 10), 20.0, 3)[0])
    assert served[0] == served[1] and len(served[0]) > 30


@pytest.mark.full("1.0-1.0")
@pytest.mark.parametrize(("pause_s", "rate"), [(0.5, 1.0), (1.0, 1.0), (1.0, 0.5)])
def test_session_limits_keep_hits_that_oldest_first_loses(pause_s: float, rate: float) -> None:
    """A quarter of the sessions fits into the memory."""
    slow = LinearSteps(prefill_token_s=1 / 2000)
    trace = small_load(24, 15, pause_s)
    oldest, fixed, gate = (
        run_closed_loop(trace, small_cell(6, rate, times=slow, admission=policy, tells_ends=True))
        for policy in ("oldest", "live:4", "sessions")
    )
    assert {run.num_requests for run in (oldest, fixed, gate)} == {360}
    assert oldest.token_hit_rate < 0.3
    assert fixed.token_hit_rate > 0.8
    assert gate.token_hit_rate > 0.7
    assert max(fixed.makespan_s, gate.makespan_s) < 0.7 * oldest.makespan_s
    assert gate.ttft_mean_s < 0.6 * oldest.ttft_mean_s
    assert gate.oldest_wait_s < gate.makespan_s


def test_sessions_count_as_live_while_the_machine_is_idle() -> None:
    """Two sessions come at once, and each pauses 1,000 s with nothing to compute."""

    class OwnSteps:
        def step_seconds(self, prefills: Any, num_decodes: int, context: int) -> float:
            return 0.001

    answer = np.zeros(1, np.int32)
    requests = [
        TraceRequest(when_s, session, None, np.full(100, session, np.int32), answer)
        for when_s in (0.0, 1000.0)
        for session in (0, 1)
    ]
    trace = Trace("pauses", 1, lambda: requests)
    settings = {"policy": "lru", "admission": "oldest", "times": OwnSteps()}
    result = closed_loop(trace, gib=1, rate=10, **settings)
    [run] = result.runs
    assert "OwnSteps" in run.config["times"] and "OwnSteps" in result.table()
    assert repr(result) == "ClosedLoopResult(pauses: 1 runs)"
    assert run.live_most == 2 and run.makespan_s > 1000
    assert run.live_mean == pytest.approx(2, abs=0.01)


def test_sessions_arrive_as_the_setting_says() -> None:
    cells = (small_cell(9.0, 2.0, starts=starts) for starts in ("fixed", "bursts:12"))
    runs = (simulate_closed_loop(random_load(0), cell).answered for cell in cells)
    fixed, burst = (sorted(one.arrival_s for one in run if not one.turn) for run in runs)
    assert fixed == [number / 2 for number in range(12)] and len({*burst}) == 1


# --- many runs ------------------------------------------------------------------------------------


def test_closed_loop_runs_are_written_and_resumed(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    grid = {"gib": 1, "policy": ["lru", "fifo"], "rate": [2, 4], "seeds": 2, "admission": "oldest"}
    result = closed_loop("short?head=20", **grid, resume_from=path)
    rows = result.to_dicts()
    assert [(row["label"], row["rate"], row["seed"]) for row in rows] == [
        (label, rate, seed) for label in ("lru", "fifo") for rate in (2, 4) for seed in (0, 1)
    ]
    assert all(0 < row["token_hit_rate"] < 1 and row["max_running"] == 16 for row in rows)
    assert all(row["times"].endswith(" ms a step") for row in rows)
    text = path.read_text()
    written = [json.loads(line) for line in text.splitlines()]
    assert [{name: (line["config"] | line)[name] for name in rows[0]} for line in written] == rows
    assert closed_loop("short?head=20", **grid, resume_from=path).to_dicts() == rows
    assert path.read_text() == text, "a resumed sweep must not repeat a run"
    assert rows[0] == closed_loop("short?head=20", **grid | {"rate": 2}).to_dicts()[0]
    assert result.figure().legends[0].get_title().get_text().startswith("Bars: ")
    [legend] = result.figure().legends
    assert [line.get_text() for line in legend.get_texts()] == ["lru", "fifo"]
    one = result.figure(legend=False)
    assert len(one.axes) == 4 and "oldest" in one.get_suptitle() and not one.legends[0].texts
    low, high = result.figure().axes[1].get_ylim()
    assert np.log10([low, high]) == pytest.approx(np.rint(np.log10([low, high]))), "whole decades"
    seeded = [closed_loop(f"short?head=9&seed={n}", gib=1, rate=1).runs for n in (1, 2)]
    figure = closed_loop_figure([run for runs in seeded for run in runs], None)
    assert len(figure.axes) == 8 and "seed=2" in figure.axes[4].get_title().replace("\n", "")
    run = seeded[0][0]
    long = replace(run, config=run.config | {"label": "mine:LongestNameOfAll(weight=2,other=3)"})
    narrow = closed_loop_figure([long], None, size=(1.6, 9.0))
    assert "All\n(weight=2,other=3)" in narrow.get_suptitle()
    other = replace(run, admission="sessions")
    both = closed_loop_figure([run, other, long], None).legends[0].get_texts()
    assert [line.get_text().partition("(")[0] for line in both] == [
        f"{run.label}, {run.admission}",
        f"{run.label}, sessions",
        "mine:LongestNameOfAll",
    ]


@pytest.mark.parametrize("height", [3.4, 4.4, 9.0])
def test_logarithmic_axes_of_small_figures_have_numbers(height: float) -> None:
    run = closed_loop("short?head=9", gib=1, rate=1).runs[0]
    slow = replace(run, rate=900.0, ttft_mean_s=1500.0, ttft_p99_s=9000.0)
    fast = replace(run, rate=0.01, ttft_mean_s=0.012, ttft_p99_s=0.012)
    more = [replace(run, rate=rate) for rate in (0.1, 0.3, 1.0, 3.0, 10.0)]
    figure = closed_loop_figure([fast, slow, *more], None, size=(3.3, height), title=False)
    figure.draw_without_rendering()
    for axis in [figure.axes[1].yaxis, figure.axes[2].yaxis, figure.axes[0].xaxis]:
        low, high = axis.get_view_interval()
        assert sum(low <= place <= high for place in axis.get_majorticklocs()) >= 2
    assert max(a.xaxis.label.get_window_extent().x1 for a in figure.axes) <= figure.bbox.x1
    assert max(a.yaxis.label.get_window_extent().y1 for a in figure.axes) <= figure.bbox.y1


def test_caches_are_compared_by_seed() -> None:
    several = {"gib": 0.5, "rate": 2, "policy": ["survival", "lru"], "admission": "oldest"}
    result = closed_loop("short?head=60", seeds=5, **several)
    ours, other = ([100 * run.token_hit_rate for run in result[name]] for name in several["policy"])
    best, rest = ("survival", "lru") if sum(ours) > sum(other) else ("lru", "survival")
    points = abs(paired(ours, other).mean)
    said = rf"oldest, 2 at 0\.5 GiB: {best} hits {points:.1f} \[.*\] points more than {rest}"
    assert re.search(said, result.table())
    assert "more than" not in closed_loop("short?head=60", **several).table(), "one seed"
    loops = several | {"policy": "lru", "admission": ["oldest", "live:2"]}
    said = r"lru, 2 at 0\.5 GiB: \S+ hits \S+ \[.*\] points more than (oldest|live:2)"
    assert re.search(said, text := closed_loop("short?head=60", seeds=5, **loops).table())
    assert "(--tells-ends)" in text
    tie = closed_loop("short?head=60", seeds=2, **several | {"policy": ["lru", "sieve"], "gib": 64})
    assert "more than" not in tie.table()


@pytest.mark.parametrize("title", [True, False])
def test_the_error_of_a_small_figure_names_a_size_that_fits(title: bool) -> None:
    result = closed_loop("short?head=9", gib=1, rate=1, policy=["lru", "fifo"], seeds=2)
    with pytest.raises(ValueError, match="has room for") as error:
        result.figure(size=(1.0, 2.0), title=title)
    assert ("title=False" in str(error.value)) == title
    [(high, wide)] = re.findall(r"make it ([\d.]+) inches high and ([\d.]+) wide", str(error.value))
    assert len(result.figure(size=(float(wide), float(high)), title=title).axes) == 4


# --- rebuilt systems ------------------------------------------------------------------------------


def test_peers_without_hits_wait_as_long_as_a_cache_without_hits() -> None:
    """All prompts differ, so only the schedule counts: that of the engine's planner."""
    rng = np.random.default_rng(0)
    requests = [
        TraceRequest(
            float(number), number % 13, number,
            *(rng.integers(0, 9, size, np.int32) for size in rng.integers((100, 1), (9000, 80))),
        )
        for number in range(40)
    ]  # fmt: skip
    loop = {"gib": 4, "rate": 20, "max_running": 4, "progress": False}
    trace = Trace("unique", 1, lambda: requests)
    [ours] = closed_loop(trace, policy="lru", checkpoints=["none"], admission="oldest", **loop).runs
    peers = closed_loop(trace, policy=(), baseline=["vllm", "sglang", "marconi-static"], **loop)
    assert "not counted" not in peers.table()
    for run in peers.runs:
        assert (run.cached_tokens, run.num_requests, run.lost_tokens) == (0, 40, None)
        assert run.ttft_mean_s == pytest.approx(ours.ttft_mean_s, rel=0.03)
        assert run.makespan_s == pytest.approx(ours.makespan_s, rel=1e-3)
        assert (run.live_most, run.admission) == (ours.live_most, "arrival")


def test_a_peer_in_closed_loop_refuses_only_a_request_that_never_fits() -> None:
    answer = np.ones(2, np.int32)
    prompts = [np.arange(size, dtype=np.int32) for size in (99_999, 50, 50)]
    requests = [TraceRequest(0.0, 1, None, prompt, answer) for prompt in prompts]
    trace = Trace("long", 1, lambda: requests)
    peers = closed_loop(trace, gib=0.6, policy=(), baseline=["marconi", "sglang"], rate=1)
    for run in peers.runs:
        assert (run.num_requests, run.num_refused, run.prompt_tokens) == (2, 1, 100)


def test_default_policies_are_the_same_everywhere() -> None:
    assert CacheConfig(num_kv_tokens=8, num_slots=1).eviction == DEFAULT_EVICTION == "survival"
    sweep = Scenario("short")
    assert (sweep.policy, sweep.checkpoints) == (DEFAULT_EVICTION, DEFAULT_PLACEMENT)
    engine = EngineConfig()
    assert (engine.eviction, engine.checkpoints) == (DEFAULT_EVICTION, (DEFAULT_PLACEMENT,))
