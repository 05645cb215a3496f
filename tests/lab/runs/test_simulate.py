"""Tests of the simulator: conservation, bounds, determinism, golden hit counts, reports and
figures."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcache.command.extras import version
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.times import Roofline
from hybridcache.geometry.units import GIB
from hybridcache.lab.results.figures import COLOURS, LOSSES, line_look, panels
from hybridcache.lab.results.report import METRICS, losses_table, stats_table
from hybridcache.lab.results.result import RunResult, SessionResult
from hybridcache.lab.rivals.evictions import ALL_NAMES, make_eviction
from hybridcache.lab.rivals.systems import BASELINES
from hybridcache.lab.runs.closed_loop import closed_loop
from hybridcache.lab.runs.grid import run_grid
from hybridcache.lab.runs.serving import serve
from hybridcache.lab.runs.simulate import SimulationResult, optimum, run_cell, simulate
from hybridcache.lab.runs.summary import summarise
from hybridcache.lab.runs.target import LeaseTarget, build_target
from hybridcache.lab.scenario import MEMORIES, Scenario
from hybridcache.lab.traces import open_trace
from hybridcache.lab.traces.generators import short
from hybridcache.lab.traces.intervals import ratio
from hybridcache.lab.traces.prefix_tree import InfiniteCache
from hybridcache.lab.traces.sizes import working_set_bytes
from hybridcache.lab.traces.statistics import doubts, trace_stats
from hybridcache.lab.traces.trace import Trace, TraceRequest
from hybridcache.radix.api import Losses
from hybridcache.radix.protocol import EvictionPolicy
from tests.refused import refused

SAMPLES = Path(__file__).parents[1] / "traces" / "samples"
GEOMETRY = ModelGeometry.preset("qwen3.5-0.8b")
SMALL = replace(GEOMETRY, kv_bytes_per_token=10, recurrent_elements=0, conv_bytes=640)
"""Model with a state as large as the KV of 64 tokens."""


def one_cell(num_bytes: int, model: ModelGeometry = SMALL, **settings: Any) -> Scenario:
    """Return a cell with a memory of ``num_bytes``."""
    settings = {"times": Roofline(model)} | settings
    return Scenario("own", model=model, gib=num_bytes / GIB, **settings)


def random_requests(seed: int, count: int) -> list[TraceRequest]:
    """Return requests with few distinct tokens and a few common prefixes, so that they overlap in
    many ways."""
    rng = np.random.default_rng(seed)
    stems = [rng.integers(0, 3, int(rng.integers(1, 400)), dtype=np.int32) for _ in range(4)]
    found = []
    for number in range(count):
        stem = stems[int(rng.integers(4))]
        cut = int(rng.integers(1, len(stem) + 1))
        tail = rng.integers(0, 2, int(rng.integers(0, 90)), dtype=np.int32)
        prompt = np.concatenate((stem[:cut], tail))
        answer = rng.integers(0, 3, int(rng.integers(0, 80)), dtype=np.int32)
        namespace = None if number % 5 else "other"
        found.append(TraceRequest(number * 0.05, int(rng.integers(6)), namespace, prompt, answer))
        stems[int(rng.integers(4))] = np.concatenate((prompt, answer))[:600]
    return found


@pytest.mark.full("arc", "gdsf", "lru", "marconi", "survival", "w-tinylfu")
@pytest.mark.parametrize("policy", sorted(ALL_NAMES))
@settings(max_examples=6)
@given(st.integers(0, 10**6), st.integers(1_000, 30_000))
def test_policy_conserves_tokens_below_the_bound(policy: str, seed: int, budget: int) -> None:
    requests = random_requests(seed, 40)
    cell = one_cell(budget, policy=policy, checkpoints="branch,backoff,every:128,end")
    runs = []
    for _ in range(2):
        target = build_target(cell, unit=1)
        assert isinstance(target, LeaseTarget)
        log = serve(target, requests, 1, cell)
        target.cache.check(held_tokens=0, held_slots=0)
        runs.append((list(log.cached_tokens), list(log.ttft_s), log.losses))
        assert sum(log.losses) + sum(log.cached_tokens) == sum(log.prompt_tokens)
        assert min(log.losses) >= 0
    assert runs[0] == runs[1], "not deterministic"
    bound = InfiniteCache()
    ideal = [bound.ideal_tokens(request, 1) for request in requests]
    assert all(cached <= best for cached, best in zip(runs[0][0], ideal, strict=True))


@pytest.mark.parametrize("baseline", sorted(BASELINES))
def test_baseline_stays_below_the_bound_and_has_no_unknown_figures(baseline: str) -> None:
    trace = short()
    cell = one_cell(200 << 20, GEOMETRY, baseline=baseline)
    target = build_target(cell, unit=1)
    log = serve(target, trace, 1, cell)
    bound = InfiniteCache()
    assert all(
        cached <= bound.ideal_tokens(request, 1)
        for cached, request in zip(log.cached_tokens, trace, strict=True)
    )
    result = summarise(cell, log, target, trace.full_name)
    assert result.losses is None and result.checkpoints_made is None


def test_requests_that_do_not_fit_are_bypassed() -> None:
    result = simulate(short().head(20), model=SMALL, gib=300 * 10 / 2**30)
    [run] = result.runs
    assert run.bypassed > 0 and run.cached_tokens == 0
    assert run.losses is not None and run.losses.refused > 0
    [run] = simulate("short?head=20", gib=0.3, memory="pools", kv_share=0.9).runs
    assert run.bypassed == run.requests and run.cached_tokens == 0, "no state fits"
    table = simulate("agent?head=3", gib=[0.05, 8], policy=["lru", "fifo"]).table()
    assert "of fifo computed without the cache, because they do not fit: 3 at 0.05 GiB\n" in table
    assert "do not fit" not in simulate("short?head=20", gib=1).table()


@pytest.mark.parametrize("checkpoint_dtype", ["auto", "bfloat16", "int8", "fp8:row"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_running_requests_have_states_of_their_own(memory: str, checkpoint_dtype: str) -> None:
    """Checkpoints in their own precision leave running states outside of the cache's memory."""
    share = 0.5 if memory == "pools" else None
    settings = {"memory": memory, "kv_share": share, "checkpoint_dtype": checkpoint_dtype}
    result = simulate("short?head=60", gib=1, **settings)
    assert not result.failures and result.runs[0].bypassed == 0


def comparable(run: RunResult) -> RunResult:
    return replace(run, control_us=0.0)


def test_sweep_is_independent_of_processes_and_resumes(tmp_path: Path) -> None:
    policies = ("marconi:1e-1", "tests.lab.runs.test_simulate:DeepestFirst")
    scenario = Scenario("short", model=GEOMETRY, policy=policies)
    cells = scenario.cells([size / 1024 for size in (20, 40, 80)])
    path = tmp_path / "runs.jsonl"
    kept: Any = {"resume_from": path, "kind": RunResult}
    alone, _ = run_grid(short(), cells, run_cell)
    done: list[tuple[int, int]] = []
    first, _ = run_grid(short(), cells[:4], run_cell, **kept)
    path.write_bytes(path.read_bytes() + b'{"key": "torn\xff')
    run = partial(run_grid, short(), cells, run_cell, **kept)
    both, _ = run(processes=2, progress=lambda *at: done.append(at))
    assert list(map(comparable, alone)) == list(map(comparable, both))
    assert both[:4] == first and done == [(5, 6), (6, 6)]
    with warnings.catch_warnings(action="error"):
        assert run() == (both, ())
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 6
    text = path.read_text()
    path.write_text(text.replace("\n", "\n{}\n", 1).replace(f'"{version()}"', '"0.1"', 2))
    with warnings.catch_warnings(record=True, action="always") as caught:
        assert run() == (both, ())
    assert len(caught) == 2 and "line 2: damaged" in str(caught[0].message)
    assert ": 2 runs of version 0.1 reused" in str(caught[1].message)
    path.write_text(text)

    assert path.read_text().endswith("\n")


def test_warnings_of_worker_processes_are_given_here(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text('{"tokens": [1, 2], "odd": 3}\n')
    with pytest.warns(UserWarning, match="not read: odd"):
        simulate(path, model=GEOMETRY, gib=[1, 2], bound=False, processes=2)
    assert "odd" not in capfd.readouterr().err


def test_changed_trace_file_is_simulated_again(tmp_path: Path) -> None:
    path, trace = tmp_path / "runs.jsonl", tmp_path / "trace.jsonl"
    lines = [
        json.dumps({"timestamp": n, "session": n, "tokens": [*range(n, 200)], "output_length": 1})
        for n in range(3)
    ]

    def requests(kept: list[str], head: str) -> int:
        trace.write_text("\n".join(kept) + "\nbad\n")
        opened = open_trace(f"{trace}{head}", skip_bad=True)
        for _ in range(2):
            [run] = simulate(opened, model=GEOMETRY, gib=1, bound=False, resume_from=path).runs
        return run.requests

    assert [requests(lines[:2], head) for head in ("", "?head=9", "", "?head=9")] == [2] * 4
    assert len(path.read_text().splitlines()) == 2, "an unchanged file must not be simulated again"
    assert [requests(lines, head) for head in ("", "?head=9")] == [3, 3]


class DeepestFirst(EvictionPolicy):
    """Custom policy that evicts the deepest candidate first."""

    def __init__(self) -> None:
        self.items: list[object] = []

    def add(self, item: object) -> None:
        self.items.append(item)

    def discard(self, item: object, evicted: bool) -> None:
        self.items.remove(item)

    def victim(self, kind: str | None):
        fitting = [item for item in self.items if kind in (None, item.kind)]
        return max(fitting, key=lambda item: (item.position, item.serial), default=None)


def test_result_contains_the_memory_layout() -> None:
    runs = [
        simulate("short?head=60", gib=2, bound=False, **options).runs[0]
        for options in (
            *({}, {"memory": "moves"}),
            *({"memory": "budget"}, {"memory": "pools", "kv_share": 0.5}),
        )
    ]
    assert [run.config["memory"] for run in runs] == list(MEMORIES)
    assert [run.label for run in runs] == [
        *("survival", "survival (moves)"),
        "survival (budget)",
        "survival (pools 50% KV)",
    ]
    for spec, options in (
        ("chat?head=60", {"gib": "0.3,1,2", "host_gib": 1.0, "disk_gib": 4.0}),
        ("agent?head=40", {"gib": "0.2,2", "page_size": 16, "checkpoint_dtype": "int8"}),
        (f"{SAMPLES / 'mooncake.jsonl.gz'}?head=60", {"gib": "0.2,2,8"}),
    ):
        counted, moved = (
            simulate(spec, bound=False, policy="lru,survival", memory=memory, **options).runs
            for memory in ("arena", "moves")
        )
        assert [(run.by_session, run.bypassed, run.tier_bytes) for run in counted] == [
            (run.by_session, run.bypassed, run.tier_bytes) for run in moved
        ], "an arena hits as the count of its bytes"
        assert any(run.moved_slabs for run in moved)
    assert [run.moved_slabs is not None for run in runs] == [False, True, False, False]
    [peer] = simulate("short?head=60", gib=2, bound=False, policy=(), baseline="vllm").runs
    assert peer.config["memory"] is None
    refused("memory 'pools' needs a kv_share", simulate, "short?head=60", gib=2, memory="pools")
    for options in ({"kv_share": 0.5}, {"memory": "budget", "kv_share": 0.5}):
        refused("is for memory 'pools'", simulate, "short?head=60", gib=2, **options)


def test_sizes_may_be_shares_of_the_working_set() -> None:
    trace, geometry = short().head(40), ModelGeometry.preset("qwen3-next")
    whole = working_set_bytes(trace, geometry)
    distinct = trace_stats(trace).distinct_tokens
    assert whole == distinct * geometry.kv_bytes_per_token + 40 * geometry.state_bytes
    runs = simulate(trace, gib="10%,100%", policy="lru").runs
    assert [run.gib for run in runs] == pytest.approx([whole / 10 / GIB, whole / GIB], rel=1e-5)
    assert runs[1].losses is not None and not runs[1].losses.kv_evicted
    refused("all sizes in GiB, or all with %", simulate, trace, gib="1:100%:3")


def test_sessions_of_a_run_sum_to_its_figures_and_give_its_interval() -> None:
    lru, survival = simulate("chat", gib=2, policy=("lru", "survival"), bound=False).runs
    for run in (lru, survival):
        sums = [sum(column) for column in zip(*(one[1:4] for one in run.by_session), strict=True)]
        assert sums == [run.requests, run.prompt_tokens, run.cached_tokens]
        for one in run.by_session:
            assert one.losses is not None
            assert one.cached_tokens + sum(one.losses) == one.prompt_tokens
        record = json.loads(json.dumps(run.as_record()))
        assert RunResult.from_record(record) == run
        rates = "token_hit_rate", "request_hit_rate", "share_of_bound", "share_of_optimum"
        assert [record[name] for name in rates] == [getattr(run, name) for name in rates]
        parts = [one.cached_tokens for one in run.by_session]
        bootstrap = ratio(parts, [one.prompt_tokens for one in run.by_session])
        assert run.interval.mean == bootstrap.mean == run.token_hit_rate
        assert run.interval.low == pytest.approx(bootstrap.low, abs=0.005)
        assert run.interval.high == pytest.approx(bootstrap.high, abs=0.005)
    gain = survival.above(lru).scaled(0.01)
    assert gain.mean == pytest.approx(survival.token_hit_rate - lru.token_hit_rate)
    pairs = zip(survival.by_session, lru.by_session, strict=True)
    differences = [one.cached_tokens - two.cached_tokens for one, two in pairs]
    again = ratio(differences, [one.prompt_tokens for one in lru.by_session])
    assert (gain.low, gain.high) == pytest.approx((again.low, again.high), abs=0.005)
    half = 100 * lru.interval.half_width
    table = simulate("chat", gib=2, policy="lru").table()
    assert f"{100 * lru.token_hit_rate:.1f} ± {half:.1f}" in table
    few = simulate("short?head=3", gib=1).table()
    assert "±" not in few and "no intervals: 3 sessions, fewer than 5" in few


def test_competitors_with_one_name_are_refused() -> None:
    for names in ({"policy": ["lru", "lru"]}, {"checkpoints": ["end,branch", "end, branch"]}):
        refused("two competitors are called ", simulate, "short?head=9", gib=1, **names)


@pytest.mark.full
def test_script_without_main_guard_gets_a_clear_error(tmp_path: Path) -> None:
    """The worker processes run the script again. The trace is longer than the buffer of a pipe."""
    script = tmp_path / "script.py"
    script.write_text(
        "from hybridcache import open_trace, simulate\n"
        "trace = open_trace('short?head=40').kept()\n"
        "simulate(trace, gib=[1, 2], processes=2, bound=False)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "put its calls below \"if __name__ == '__main__':\"" in done.stderr.splitlines()[-1]
    assert done.stderr.count("Traceback") == 1, "only the script may print a traceback"


def _die(_trace: Trace, _job: int) -> int:
    os._exit(9)


def test_killed_worker_process_gives_a_clear_error() -> None:
    with pytest.raises(ChildProcessError, match=r"lack of memory \(use fewer processes\)"):
        run_grid(short(), [1, 2], _die, processes=2)


def test_functions_of_the_laboratory_take_a_scenario() -> None:
    replay = Scenario("short?head=30", gib=2, policy="lru")
    loop = replace(replay, rate=2, admission="oldest")
    load = {"rate": 2, "admission": "oldest", "policy": "lru"}
    for function, scenario, others in (
        (simulate, replay, {"policy": "lru"}),
        (closed_loop, loop, load),
        (optimum, replay, {}),
    ):
        by_name = {"gib": 2} | others
        first, again = function(scenario), function("short?head=30", **by_name)
        assert first.table() == again.table()
        rows = [] if function is optimum else zip(first.to_dicts(), again.to_dicts(), strict=True)
        for one, two in rows:
            ignored = {"control_us": 0}
            assert one | ignored == two | ignored and "head=30" in one["trace"]
        with pytest.raises(TypeError, match="no setting 'polcy', did you mean 'policy'"):
            function("short?head=9", polcy="lru")
    assert simulate(replay, policy="fifo").runs[0].label == "fifo"
    refused("policy has no effect on the optimum", optimum, "short?head=9", policy="nonsense")
    for scenario, others in ((loop, {}), (replay, {"rate": 2}), (replay, {"tells_ends": True})):
        refused(r"call closed_loop\(\.\.\.\)", simulate, scenario, **others)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("priority_classes", "no"), ("host_gib", "4"), ("rate", None), ("seeds", 1.5)),
        *(("gib", [True]), ("gib", "1,1,1"), ("page_size", True)),
        *(("trace", 3), ("trace", ["short"])),
        *(("gib", "2:2:3"), ("gib", [1, 1.0]), ("gib", "1,1.0"), ("rate", "2:2:3")),
        ("model", 3),
        *(("checkpoint_dtype", 3), ("gib", {}), ("gib", [None]), ("gib", True)),
    ],
)
def test_wrong_types_and_repeated_values_are_refused(name: str, value: Any) -> None:
    refused(f"^{name} ", Scenario, **{"trace": "short"} | {name: value})
    with pytest.raises(ValueError, match=r"a policy must be a name.*got 3"):
        simulate("short", gib=1, policy=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        *({"optimum": "yes"}, {"bound": 1}, {"processes": "2"}, {"processes": 0}),
        *({"gib": 1e-6}, {"gib": (1, 1e-6)}),
        {"memory": "pools", "kv_share": 0},
        *({"gib": 1e-6, "memory": "pools", "kv_share": 0.5}, {"gib": 1e-6, "baseline": "vllm"}),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence_that_names_them(wrong: dict[str, Any]) -> None:
    [name] = list(wrong)[:1]
    with pytest.raises((TypeError, ValueError), match=f"^{name} ") as caught:
        simulate("short?head=9", **wrong)
    assert "\n" not in str(caught.value)
    if name == "processes" or list(wrong) == ["gib"]:
        with pytest.raises((TypeError, ValueError), match=f"^{name} "):
            closed_loop("short?head=9", **{"gib": 1} | wrong)


def test_scenario_survives_toml_and_its_hash_is_the_identity_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    for trace, speed in (("📁/t.jsonl", float("inf")), ("short?head=30", 9.5)):
        scenario = Scenario(trace, gib="1,2", policy=("lru", "fifo"), host_gib=1, host_gb_s=speed)
        path.write_text(scenario.to_toml())
        assert Scenario.load(path) == scenario
    with pytest.raises(ValueError, match="make it a dataclass"):
        replace(scenario, times=type("Times", (), {"seconds": None})()).cells([1])[0].key(b"trace")
    cells = scenario.cells((1.0, 2.0))
    keys = [cell.key(b"trace") for cell in cells]
    assert len(set(keys)) == 4 and keys == [replace(cell).key(b"trace") for cell in cells]
    assert cells[0].key(b"another") != keys[0]
    for change in ({"grid": 32}, {"host_gib": 2.0}, {"model": "qwen3.5-0.8b"}, {"servers": 2}):
        assert replace(cells[0], **change).key(b"trace") != keys[0]
    for text, problem in (
        ('[scenario]\ntrace = "short"', "no trace in it outside of a table"),
        ('trace = "short"\npolcy = "lru"', "no setting 'polcy', did you mean 'policy'"),
        ("trace = ", "Invalid value"),
    ):
        path.write_text(text)
        refused(f"s.toml: .*{problem}", Scenario.load, path)
    with pytest.raises(ValueError, match="name the policy as in"):
        Scenario("short", policy=lambda: None).to_toml()  # type: ignore[arg-type]


GOLDEN_FILES = {
    "budget": Path(__file__).parent / "golden_hits.json",
    "arena": Path(__file__).parent / "golden_hits_arena.json",
}
GOLDEN_TRACES = {
    "mooncake": (f"{SAMPLES / 'mooncake.jsonl.gz'}?head=250", (20, 60)),
    "coding-agent": (f"{SAMPLES / 'coding_agent.jsonl.gz'}", (4, 12)),
    "chat": ("chat?head=200", (4,)),
    "agent-tree": ("agent-tree?tasks=4", (2, 6)),
}


def golden_hits(trace: str, memory: str) -> dict[str, list[int]]:
    """Return the cached tokens of each competitor at each size.

    Competitors are all eviction policies with static placement, and the default pair as
    ``survival @ adaptive``. Baselines have their own memory management, so they run only once, with
    ``budget``.
    """
    spec, gib = GOLDEN_TRACES[trace]
    requests = open_trace(spec).kept()
    options = {"gib": gib, "bound": False, "memory": memory}
    baselines = ["vllm", "sglang", "lightllm", "marconi"] if memory == "budget" else []
    static = "branch,boundary,backoff,end"
    result = simulate(
        requests, policy=sorted(ALL_NAMES), checkpoints=static, baseline=baselines, **options
    )
    ours = simulate(requests, **options)
    assert [run.config["policy"] for run in ours.runs] == ["survival"] * len(gib)
    hits = {
        label.removesuffix(" (budget)").removesuffix(f" @ {static}"): runs
        for label, runs in result.by_label().items()
    }
    return {
        label: [run.cached_tokens for run in runs]
        for label, runs in (*hits.items(), ("survival @ adaptive", ours.runs))
    }


@pytest.mark.full("chat-budget")
@pytest.mark.parametrize("memory", list(GOLDEN_FILES))
@pytest.mark.parametrize("trace", list(GOLDEN_TRACES))
def test_hit_counts_match_the_golden_files(trace: str, memory: str) -> None:
    """Hits are exact for each policy, trace and size. After an intended change, rewrite the files
    with ``python -m tests.lab.runs.test_simulate``."""
    golden = json.loads(GOLDEN_FILES[memory].read_text())[trace]
    assert golden_hits(trace, memory) == golden


@pytest.fixture(scope="module")
def small() -> SimulationResult:
    return simulate("short?head=30", gib=[1, 2], policy=["lru", "fifo"], baseline=["vllm"])


def test_verdict_names_no_policy_without_a_hit(tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text('{"tokens": [1, 2, 3]}\n' * 2)
    result = simulate(str(path), gib=1, policy=["lru", "fifo"])
    assert result.verdict() == "at 1 GiB: no policy has a hit"
    found = simulate(recorded("short?head=30"), gib=1, policy=["lru", "fifo"]).verdict()
    equal = r"at 1 GiB: lru has the most hits \(not different: fifo\)\n"
    assert re.match(f"{equal}flags of engine serve: --cache-gib 1 ", found)
    paths = Scenario(Path("short"), model=Path("qwen3"), times=Path("t.json"))
    assert paths == Scenario("short", model="qwen3", times="t.json")
    assert open_trace(Path("short")).name == "short"
    few = simulate(recorded("short?head=3"), gib=1, policy=["lru", "fifo"])
    assert "--model ./mine --cache" in few.verdict("./mine")
    assert "(no interval: 3 sessions)" in few.verdict()


def test_verdict_has_a_line_per_size_and_flags_of_a_size_that_the_policy_leads() -> None:
    """The policy of the best mean can have fewer hits at the size of its own most hits."""
    run = simulate("short?head=60", gib=1, policy="lru", bound=False, progress=False).runs[0]
    sessions = run.by_session

    def at(label: str, gib: float, cached: int) -> RunResult:
        parts = tuple(one._replace(cached_tokens=cached) for one in sessions)
        total = {"by_session": parts, "cached_tokens": cached * len(parts)}
        return replace(
            run, config=run.config | {"label": label, "policy": label, "gib": gib}, **total
        )

    def verdict(**hits: list[int]) -> list[str]:
        runs = [at(label, gib, n) for label, of in hits.items() for gib, n in enumerate(of, 1)]
        return SimulationResult("t", geometry, tuple(runs), None).verdict().split("\n")

    geometry = Scenario("short").geometry()
    assert re.search(
        r"points more than lru, \S+ \[\S+ \S+\] than fifo$",
        verdict(gdsf=[400], lru=[100], fifo=[50])[0],
    )
    lines = verdict(lru=[100, 500, 500], gdsf=[400, 450, 500])
    assert [line.partition(", ")[0] for line in lines] == [
        "at 1 GiB: gdsf has the most hits",
        "at 2 GiB: lru has the most hits",
        "at 3 GiB: lru",
        "in the mean of 3 sizes",
    ]
    assert lines[2] == "at 3 GiB: lru, gdsf have the most hits (equal)"
    points = 100 * 300 * len(sessions) / run.prompt_tokens
    assert re.search(rf"hits, {points:.1f} \[\S+, \S+\] points more than lru$", lines[0])
    assert "gdsf has the most hits; flags of engine serve: --cache-gib 3 --ev" in lines[-1]
    assert "--cache-gib 1 --eviction gdsf" in verdict(lru=[100, 500], gdsf=[400, 450])[-1]
    best_nowhere = verdict(lru=[900, 10], fifo=[10, 900], gdsf=[800, 800])
    assert best_nowhere[-1].endswith("mean of 2 sizes, gdsf has the most hits, but at none of them")
    assert "gdsf" not in verdict(lru=[300, 500], gdsf=[450])[-1], "it has no run at 2 GiB"
    equal = verdict(lru=[9, 10], survival=[9, 10])[-1]
    assert "2 sizes, lru, survival have the most hits (equal); flags of engine" in equal
    assert equal.count("--eviction survival") == 1, "the server's default"


def recorded(spec: str) -> Trace:
    """Return a trace whose texts and times cannot be drawn again."""
    return replace(open_trace(spec).kept(), recipe="")


def test_one_draw_gives_no_verdict(tmp_path: Path) -> None:
    """Arrivals of a conversation file, and texts of a generator, are one draw without --seeds."""
    path = tmp_path / "chats.json"
    turns = [
        {"from": who, "value": f"{who} {n} " * 30} for n in range(3) for who in ("human", "gpt")
    ]
    chats = [{"id": f"c{n}", "conversations": [*turns[:2], *turns]} for n in range(6)]
    path.write_text(json.dumps(chats))
    policies = {"policy": ["lru", "fifo"], "gib": 0.3, "bound": False, "progress": False}
    for spec, part in ((f"{path}?tokenizer=bytes", "arrivals"), ("short?head=30", "trace")):
        found = simulate(spec, **policies)
        assert found.verdict() == f"one draw of the {part}: run --seeds 5 to compare policies"
        two = simulate(spec, seeds=2, **policies)
        assert "the most hits" in two.verdict()
        assert ("the conversations are the same" in two.table()) == (part == "arrivals")
    assert "(no interval: 2 seeds)" in simulate("short?head=30", seeds=2, **policies).verdict()


def test_intervals_without_sessions_are_over_groups_that_share_prompts(tmp_path: Path) -> None:
    path, lines = tmp_path / "blocks.jsonl", []
    for turn in range(3):
        for chat in range(6):  # six conversations of three turns with a common first block
            blocks = [0, *(100 * chat + 10 * n + k for n in range(turn + 1) for k in (1, 2, 3))]
            record = {"timestamp": 1000 * len(lines), "hash_ids": blocks, "output_length": 1}
            lines.append(json.dumps(record | {"input_length": 512 * len(blocks)}))
    path.write_text("\n".join(lines))
    result = simulate(str(path), gib=8, policy="lru", bound=False, progress=False)
    [run] = result.runs
    assert len(run.by_session) == 6 and {one.requests for one in run.by_session} == {3}
    assert sum(one.cached_tokens for one in run.by_session) == run.cached_tokens > 0
    assert sum(sum(one.losses or ()) for one in run.by_session) == sum(run.losses or ()) > 0
    assert "over 6 groups of requests that share half of a prompt (no sessions" in result.table()
    named = [json.dumps(json.loads(line) | {"session_id": n % 6}) for n, line in enumerate(lines)]
    path.write_text("\n".join(named))
    assert "over 6 sessions, cut" in simulate(str(path), gib=8, policy="lru").table()


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"grid": 32, "host_gib": 2.0}, " --grid 32 --host-gib 2.0"),
        ({"grid": 16, "disk_gib": 2.0}, " --grid 16 --state-dir DIR --disk-gib 2.0"),
        ({"checkpoint_dtype": "int8:head"}, " --checkpoint-dtype int8:head"),
        ({"policy": ["survival", "marconi"], "priority_classes": False}, ""),
        ({"priority_classes": False}, " not support --no-priority-classes"),
        ({"state_dtype": "fp8", "grid": 8}, " not support --state-dtype fp8, --grid 8"),
        ({"memory": "pools", "kv_share": 0.5}, " not support --memory pools"),
        ({"policy": ["lru", lambda: make_eviction("fifo")()]}, " not support unnamed policies"),
    ],
)
def test_verdict_has_the_settings_that_won(settings: dict[str, Any], flags: str) -> None:
    settings = {"policy": ["lru", "fifo"]} | settings
    trace = recorded("short?head=30")
    found = simulate(trace, gib=0.3, bound=False, **settings).verdict("DIR")
    command = r"to serve: engine serve --model DIR --cache-gib 0.3"
    command += " --eviction (lru|fifo|marconi) --checkpoints adaptive"
    assert re.search(f"\n({command}|engine serve does){re.escape(flags)}$", found), found


def test_sizes_of_results_are_those_asked_for() -> None:
    sizes = [0.1, 1 / 3]
    result = simulate("short?head=9", gib=sizes, policy="lru", optimum=True)
    assert [row["gib"] for row in result.to_dicts()] == sizes
    assert [plan.gib for plan in optimum("short?head=9", gib=sizes)] == sizes


def test_rebuilt_systems_with_more_hits_are_named() -> None:
    """LightLLM, whose states are in host memory, also reuses where no request of ours fits."""
    policies, systems = ["lru", "survival"], ["marconi", "lightllm", "vllm"]
    trace = recorded("conversations?head=60")
    result = simulate(trace, gib=[0.05, 4], policy=policies, baseline=systems)
    small = replace(result, runs=tuple(run for run in result.runs if run.gib < 1))
    points = 100 * small.best(0.05).token_hit_rate
    assert small.best(0.05).label == "lightllm (rebuilt)"
    more = f"no policy has a hit; lightllm (rebuilt) has {points:.1f} points more"
    assert small.verdict() == f"at 0.05 GiB: {more}"
    equal = "at 4 GiB: survival has the most hits (not different: lru)"
    assert f"0.05 GiB: {more}\n{equal}" in result.verdict()
    table = result.table()
    assert table.endswith("not counted: 512 states in host memory (lightllm (rebuilt))")
    alone = simulate("short?head=30", gib=1, policy=["lru", "fifo"])
    assert "not counted" not in alone.table()


def test_intervals_stay_within_0_and_100_percent(small: SimulationResult) -> None:
    cached = [10, 7, 10, 10, 10]
    sessions = [SessionResult(f"{n}", 1, 10, tokens) for n, tokens in enumerate(cached)]
    facts = {"by_session": tuple(sessions), "prompt_tokens": 50, "cached_tokens": sum(cached)}
    result = replace(small, runs=(replace(small.runs[0], **facts),))
    assert str(result.runs[0].interval) == "94.0 [77.3, 100.0] %"
    assert " 94.0 [77.3, 100.0]\n" in result.table()
    first = small.runs[0]
    assert f"{first.interval:.3f}".startswith(f"{first.token_hit_rate:.3f} [")


# --- Plots --------------------------------------------------------------------------------------


def test_figures_draw_every_run(small: SimulationResult) -> None:
    pytest.importorskip("matplotlib")
    [axis] = small.figure().axes
    assert len(axis.collections) == 3, "each line has bars of its intervals"
    assert {bars.get_alpha() for bars in axis.collections} == {0.35}, "bars are behind lines"
    lines = [line for line in axis.get_lines() if line.get_marker() != "None"]
    widths = [line.get_linewidth() for line in lines]
    assert widths == sorted(widths, reverse=True), "a line must not hide the lines under it"
    for line, runs in zip(lines, small.by_label().values(), strict=True):
        assert list(line.get_xdata()) == [1, 2], "each simulated size needs a marker"
        assert list(line.get_ydata()) == [100 * run.token_hit_rate for run in runs]
    baselines = replace(small, runs=tuple(run for run in small.runs if run.config["baseline"]))
    refused("rebuilt peers do not record them", baselines.losses_figure)
    assert small.figure(metric="ttft-p50").axes[0].get_ylabel() == "TTFT P50, ms"
    planned = simulate("short?head=40", gib=(1, 2), policy="lru", optimum=True)
    assert len(planned.figure(metric="hit").axes) == 1
    assert len(planned.figure().axes) == 2


def lightness(pixels: np.ndarray) -> np.ndarray:
    """Return CIE L* of sRGB values from 0 to 1: [..., 3] to [...]."""
    linear = np.where(pixels <= 0.04045, pixels / 12.92, ((pixels + 0.055) / 1.055) ** 2.4)
    return 116 * np.cbrt(linear @ (0.2126, 0.7152, 0.0722)) - 16


def rendered(figure: Any) -> np.ndarray:
    """Return the pixels of a figure, 0 to 1, the lowest row first: [height, width, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[::-1, :, :3] / 255


def test_areas_of_losses_differ_in_grey(small: SimulationResult) -> None:
    [run, *_] = small.runs
    causes = len(LOSSES)
    parts = dict.fromkeys(Losses._fields, 100)
    full = replace(run, losses=Losses(**parts), cached_tokens=100, prompt_tokens=100 * causes + 100)
    figure = replace(small, runs=(full,), bound_rate=None).losses_figure()
    pixels, [axis] = rendered(figure), figure.axes
    heights = [(100 * place + 50) / (causes + 1) for place in range(causes + 1)]
    places = [axis.transData.transform((full.gib * 1.05, height)) for height in heights]
    found = [lightness(pixels[int(y), int(x)]) for x, y in places]
    assert found[0] > 99, "reused is white"
    distances = np.abs(np.diff(found))
    assert distances.min() > 9, dict(zip(reversed(LOSSES), distances.round(1), strict=True))
    assert all(a < b for a, b in pairwise(found[1:])), "any two causes that remain also differ"


def test_figures_have_the_size_asked_for_and_no_empty_cells(small: SimulationResult) -> None:
    ours = [run for run in small.runs if run.label == "lru"]
    for figure in (
        small.figure(size=(3.3, 2.6), title=False),
        small.figure(size=(7, 4), metric=["hit", "ttft-p50"]),
        small.losses_figure(size=(7, 3), title=False),
        small.losses_figure(size=(3.3, 2.6), title=False),
    ):
        assert tuple(figure.get_size_inches()) in ((3.3, 2.6), (7, 4), (7, 3))
        assert _is_inside(figure)
    for size in (3.3, (3.3,), (3.3, 0), "large"):
        for draw in (small.figure, small.losses_figure):
            refused(r"^size must be \(width, height\) in inches", draw, size=size)
    assert not small.losses_figure(legend=False).legends[0].texts
    for legend in ("below", "outside", 1):
        refused(r"^legend must be True \(below the panels\)", small.figure, legend=legend)
    three = [replace(run, config=run.config | {"label": f"p{n}"}) for n in range(3) for run in ours]
    many = replace(small, runs=tuple(three))
    place = {"size": (3.3, 2.4), "title": False}
    refused(r"2 panels and .* 4 names \(got 3\): draw fewer, leave", many.losses_figure, **place)
    assert _is_inside(many.losses_figure(size=(3.3, 3.9), title=False)), "two rows"
    nine = [replace(r, config=r.config | {"label": f"policy {n}"}) for n in range(9) for r in ours]
    column = replace(small, runs=tuple(nine))
    refused(r"of 10 names .*leave out the legend \(legend=False", column.figure, **place)
    assert _is_inside(column.figure(**place, legend=False))
    short = column.labelled({f"policy {n}": str(n) for n in range(9)})
    assert _is_inside(short.figure(size=(3.3, 3.2), title=False))
    assert small.figure(title="Chats").get_suptitle() == "Chats"
    bare = small.figure(title=False)
    assert not bare.axes[0].get_title() and not bare.legends[0].get_title().get_text()
    for count, rows in ((1, [1]), (2, [2]), (4, [2, 2]), (5, [3, 2]), (7, [3, 2, 2])):
        figure, axes = panels(count, 3)
        tops = [round(axis.get_position().y0, 3) for axis in axes]
        assert len(axes) == len(figure.axes) == count
        assert [tops.count(top) for top in dict.fromkeys(tops)] == rows
        ends = [axes[sum(rows[: n + 1]) - 1].get_position().x1 for n in range(len(rows))]
        assert max(ends) - min(ends) < 1e-9, "each row reaches the right edge"


def _is_inside(figure: Any) -> bool:
    """Return whether panels, legend and texts are inside of the figure and do not overlap."""
    figure.draw_without_rendering()
    panels = [axis.get_tightbbox() for axis in figure.axes if axis.get_visible()]
    others = [one.get_window_extent() for one in (*figure.texts, *figure.legends)]
    right, top = figure.bbox.max
    within = all(
        box.x0 >= -1 and box.x1 <= right + 1 and box.y0 >= -1 and box.y1 <= top + 1
        for box in (*panels, *others)
    )
    pairs = itertools.combinations([*panels, *others], 2)
    return within and not any(a.overlaps(b) for a, b in pairs)


def test_figures_are_not_cut_off(small: SimulationResult) -> None:
    pytest.importorskip("matplotlib")
    assert _is_inside(small.figure()) and _is_inside(small.losses_figure())
    assert _is_inside(small.figure(metric=["hit", "ttft-p50"]))
    assert small.losses_figure().get_size_inches()[0] < 11


def test_thirty_curves_differ_and_every_axis_has_a_label(small: SimulationResult) -> None:
    pytest.importorskip("matplotlib")
    many = [
        replace(run, config=run.config | {"label": f"p{n}", "policy": f"p{n}"})
        for n in range(30)
        for run in small.runs[:2]
    ]
    for figure in (
        replace(small, runs=tuple(many)).figure(),
        small.losses_figure(),
        closed_loop("short?head=9", gib=1, rate=(1, 2), memory="budget").figure(),
    ):
        assert all(axis.get_xlabel() for axis in figure.axes)
    looks = {(COLOURS[n % len(COLOURS)], str(line_look(n, 30)["linestyle"])) for n in range(30)}
    assert len(looks) == 30


def test_runs_above_the_plan_are_named(small: SimulationResult) -> None:
    assert all(one.title in small.table(metric) for metric, one in METRICS.items())
    for share in (0.5, 2):
        runs = (
            replace(run, optimum_tokens=int(run.cached_tokens / share), bound_tokens=None)
            for run in small.runs
        )
        result = replace(small, runs=tuple(runs))
        note = result.figure(metric="optimum").legends[0].get_title().get_text()
        for words in (result.table("optimum"), result.table(), note.replace("\n", " ")):
            assert ("bove the plan, which is no bound" in words) == (share == 2)
        assert ("200.0" in result.table("optimum")) == (share == 2)


def test_shares_of_the_working_set_are_shown_and_never_above_it() -> None:
    result = simulate("short?head=20", gib="1%:100%:3", policy="lru", baseline="vllm")
    assert max(run.gib for run in result.runs) * 2**30 <= result.working_set_bytes
    assert re.search(r"\(% of working set\) +1 +10 +100\n", result.table())
    assert all(run.losses is run.checkpoints_made is None for run in result.runs[3:])
    lines = losses_table(result.runs).splitlines()
    assert lines[-1] == "-: no causes are known for vllm (rebuilt)"
    rows = [line.split() for line in lines if line.startswith("vllm")]
    assert len(rows) == 3 and all(row[-7:] == ["-"] * 7 for row in rows)


# --- Time and tiers -------------------------------------------------------------------------------


class Seconds:
    """Compute time of 10 s for any tokens."""

    def seconds(self, start: int, end: int) -> float:
        return 10.0


def test_queueing_times_match_hand_computed_ones() -> None:
    tokens = np.arange(5, dtype=np.int32)
    requests = [
        TraceRequest(when, when, None, tokens + 9 * int(when), tokens) for when in (0.0, 1.0, 2.0)
    ]

    def ttft(servers: int) -> list[float]:
        cell = one_cell(1 << 30, GEOMETRY, times=Seconds(), servers=servers)
        return list(serve(build_target(cell, 1), requests, 1, cell).ttft_s)

    assert ttft(1) == [10.0, 19.0, 28.0]
    assert ttft(2) == [10.0, 10.0, 18.0]


def test_loads_slower_than_computing_are_skipped_and_counted() -> None:
    times = Roofline(ModelGeometry.preset("qwen3-next"), 4, bytes_per_s=1e30, overhead_s=0.0)
    rules = {"policy": "lru", "checkpoints": "branch,boundary,backoff,end"}
    on_tier = {"host_gib": 8, "host_gb_s": 1e-4}
    alone, slow = (
        simulate("agent?head=70", gib=2, times=times, bound=False, **rules, **tier)
        for tier in ({}, on_tier)
    )
    [alone_run], [slow_run] = alone.runs, slow.runs
    assert slow_run.cached_tokens == alone_run.cached_tokens and slow_run.copy_seconds == 0
    assert slow_run.losses.not_fetched > alone_run.losses.not_fetched == 0


def test_record_contains_the_tiers_of_each_run() -> None:
    result = simulate("agent?head=70", gib=2, host_gib=8, baseline="marconi", bound=False)
    ours, peer = result.runs
    assert (ours.config["host_gib"], peer.config["host_gib"]) == (8, 0)
    assert ours.label == "survival + 8 GiB host" and peer.tier_bytes is None
    assert RunResult.from_record(ours.as_record()) == ours


def test_seeds_of_a_replay_are_draws_of_the_trace_and_units_of_its_intervals() -> None:
    settings = {"gib": [0.5], "policy": "lru", "progress": False}
    result = simulate("short?head=60", seeds=(3, 5, 7, 8, 9), optimum=True, **settings)
    [run] = result.runs
    alone = [
        simulate(f"short?seed={seed}&head=60", optimum=True, **settings).runs[0]
        for seed in (3, 5, 7, 8, 9)
    ]
    for name in ("requests", "cached_tokens", "bound_tokens", "limit_tokens", "seconds"):
        assert getattr(run, name) == pytest.approx(sum(getattr(one, name) for one in alone)), name
    assert [unit.cached_tokens for unit in run.by_session] == [one.cached_tokens for one in alone]
    assert run.ttft_mean_s == pytest.approx(np.mean([one.ttft_mean_s for one in alone]))
    assert sum(run.losses) + run.cached_tokens == run.prompt_tokens
    assert run.interval.low < run.token_hit_rate < run.interval.high
    assert run.config["seeds"] == [3, 5, 7, 8, 9] and "over 5 seeds" in result.table()
    assert result.bound_rate == run.bound_tokens / run.prompt_tokens
    with pytest.raises(ValueError, match="must be left out for oasst-trees: no part is drawn"):
        simulate("oasst-trees", seeds=2, **settings)


def test_an_ideal_hit_rate_of_0_or_100_percent_has_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(f'{{"tokens": [{n}, 1]}}\n' for n in range(3)))
    for text in (
        simulate(path, gib=1, policy="lru", progress=False).table(),
        stats_table(trace_stats(open_trace(path))),
    ):
        assert "no prompt begins as an earlier one: if some should, compare the unit" in text
    assert "begins as" not in simulate("short?head=9", gib=1, progress=False).table()
    assert doubts(0.9996)[0].startswith("nearly all tokens of prompts") and not doubts(0.9994)


def test_drawn_arrivals_are_said_in_the_table_and_in_the_record(tmp_path: Path) -> None:
    path = tmp_path / "chats.json"
    said = [{"role": role, "content": "word " * 40} for role in ("user", "assistant") * 3]
    path.write_text(json.dumps([{"messages": said}] * 3))
    spec = f"{path}?tokenizer=bytes&starts=poisson:2&pause=7"
    results = [simulate(spec, gib=1, policy="lru", progress=False)]
    results.append(simulate(spec, gib=1, policy="lru", seeds=2, progress=False))
    drawn = "drawn, not recorded: poisson:2 sessions a second, pauses 7 s (median)"
    for result in results:
        assert f"arrivals: {drawn} (?seed=1 draws others)" in result.table()
        assert result.to_dicts()[0]["arrivals"] == drawn
    assert "arrivals" not in simulate("short?head=9", gib=1, progress=False).to_dicts()[0]
    assert f"arrivals: {drawn}" in stats_table(trace_stats(open_trace(spec)))


@pytest.mark.parametrize("where", ["record", "message"])
def test_times_of_conversations_are_not_read_and_the_note_says_so(
    tmp_path: Path, where: str
) -> None:
    """WildChat's time of a conversation is that of its last turn."""
    path, when = tmp_path / "chats.jsonl", {"timestamp": "2023-04-09T00:02:53Z"}
    said = [{"role": role, "content": "word"} for role in ("user", "assistant")]
    records = {
        "record": when | {"conversation": said},
        "message": {"conversation": [one | when for one in said]},
    }
    path.write_text(json.dumps(records[where]))
    [note] = open_trace(f"{path}?tokenizer=bytes").notes[1:]
    assert note.startswith("arrivals: drawn, timestamp of the file is not read: poisson:1 sessions")


@pytest.mark.parametrize(
    ("name", "options", "row", "said"),
    [
        ("counts", "", {"prompt_tokens": 700}, "system prompts too: 0 (?system=N)"),
        ("counts", "?system=64", {"prompt_tokens": 700}, "system prompts too: 64 (?system=N)"),
        ("mooncake", "", {"input_length": 700, "hash_ids": [1, 2]}, "grid is a block of 512"),
        ("jsonl", "", {"tokens": [1, 2, 3], "output_length": 2}, "no answer has ids: a later"),
    ],
)
def test_stats_and_tables_say_which_reuse_a_format_cannot_show(
    tmp_path: Path, name: str, options: str, row: dict[str, object], said: str
) -> None:
    (tmp_path / "t").write_text(json.dumps(row | {"session": "a"}))
    trace = open_trace(f"{name}:{tmp_path / 't'}{options}")
    assert stats_table(trace_stats(trace)).count(said) == 1
    table = simulate(trace, gib=1, policy="lru", progress=False).table()
    assert table.count(said) == (name != "jsonl")
    (tmp_path / "t").write_text('{"tokens": [1, 2], "output": [3]}')
    assert "answer has ids" not in stats_table(trace_stats(open_trace(f"jsonl:{tmp_path / 't'}")))


def test_stats_of_a_trace_without_sessions_count_none(tmp_path: Path) -> None:
    path, blocks = tmp_path / "blocks.jsonl", {"input_length": 512, "output_length": 1}
    records = [blocks | {"timestamp": 1000 * n, "hash_ids": [n]} for n in range(3)]
    path.write_text("\n".join(map(json.dumps, records)))
    assert "requests 3 in no sessions and" in stats_table(trace_stats(open_trace(path)))
    path.write_text("\n".join(json.dumps(one | {"session_id": 1}) for one in records))
    assert "requests 3 in 1 session and" in stats_table(trace_stats(open_trace(path)))


if __name__ == "__main__":
    # One line per competitor, so that the diff of a change is easy to read.
    for memory, path in GOLDEN_FILES.items():
        rows = [
            f" {json.dumps(trace)}: {{\n"
            + ",\n".join(
                f"  {json.dumps(label)}: {hits}"
                for label, hits in golden_hits(trace, memory).items()
            )
            + "\n }"
            for trace in GOLDEN_TRACES
        ]
        path.write_text("{\n" + ",\n".join(rows) + "\n}\n")
