"""The simulator: conservation, bounds, determinism, monotony, golden hit counts, and what its
reports say."""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcache.api import Losses
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.times import Roofline
from hybridcache.lab.baselines import BASELINES
from hybridcache.lab.generators import chat, short
from hybridcache.lab.infinite import InfiniteCache
from hybridcache.lab.simulation.result import RunResult, summarise
from hybridcache.lab.simulation.serving import Serving, serve
from hybridcache.lab.simulation.simulate import SimulationResult, Sweep, simulate
from hybridcache.lab.simulation.sizes import sizes
from hybridcache.lab.simulation.sweep import Job, run_sweep
from hybridcache.lab.simulation.target import (
    EngineSteps,
    LeaseTarget,
    RunConfig,
    build_target,
)
from hybridcache.lab.trace import Trace, TraceRequest
from hybridcache.lab.traces import open_trace
from hybridcache.policies.protocol import EvictionPolicy
from hybridcache.policies.registry import EVICTION

SAMPLES = Path(__file__).parent / "samples"
GEOMETRY = ModelGeometry.preset("qwen3.5-0.8b")
SERVING = Serving(Roofline(GEOMETRY))
SMALL = replace(GEOMETRY, kv_bytes_per_token=10, recurrent_elements=0, conv_bytes=640)
"""A state weighs as much as 64 tokens."""


def random_requests(seed: int, count: int) -> list[TraceRequest]:
    """Prompts of few distinct tokens from a small pool of beginnings, so that they overlap in every
    way."""
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


@pytest.mark.parametrize("policy", sorted(EVICTION))
@settings(max_examples=6)
@given(st.integers(0, 10**6), st.integers(1_000, 30_000), st.sampled_from([None, 3]))
def test_a_policy_conserves_and_never_beats_the_bound(
    policy: str, seed: int, budget: int, max_running: int | None
) -> None:
    requests = random_requests(seed, 40)
    config = RunConfig(
        SMALL, budget_bytes=budget, policy=policy, checkpoints="branch,backoff,every:128,end"
    )
    runs = []
    for _ in range(2):
        target = build_target(config, unit=1)
        assert isinstance(target, LeaseTarget)
        log = serve(target, requests, 1, replace(SERVING, max_running=max_running))
        target.cache.check(held_tokens=0, held_slots=0)
        runs.append((list(log.cached_tokens), list(log.ttft_s), log.losses))
        assert sum(log.losses) + sum(log.cached_tokens) == sum(log.prompt_tokens)
        assert min(log.losses) >= 0
    assert runs[0] == runs[1], "not deterministic"
    if max_running is None:
        bound = InfiniteCache()
        ideal = [bound.ideal_tokens(request, 1) for request in requests]
        assert all(cached <= best for cached, best in zip(runs[0][0], ideal, strict=True))


@pytest.mark.parametrize("baseline", sorted(BASELINES))
def test_a_peer_never_beats_the_bound_and_forgets_nothing_it_holds(baseline: str) -> None:
    trace = short()
    config = RunConfig(GEOMETRY, budget_bytes=200 << 20, baseline=baseline)
    target = build_target(config, unit=1)
    log = serve(target, trace, 1, SERVING)
    bound = InfiniteCache()
    assert all(
        cached <= bound.ideal_tokens(request, 1)
        for cached, request in zip(log.cached_tokens, trace, strict=True)
    )
    result = summarise(config, SERVING, log, target, trace.full_name)
    assert result.losses is None and result.checkpoints_made is None
    record = result.as_record()
    for name in ("missed_requests", "missed_tokens", "missed_flops", "checkpoint_copies"):
        assert record[name] is None, "what a peer does not tell is not 0"


@pytest.mark.parametrize("baseline", sorted(BASELINES))
def test_peers_are_refused_for_a_model_without_states(baseline: str) -> None:
    config = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = ModelGeometry.from_config(config, "plain")
    with pytest.raises(ValueError, match="plain has no linear layers"):
        simulate("short?head=20", model=model, gib=1, policy=(), baseline=baseline)


@given(st.integers(0, 10**6), st.integers(1_000, 20_000))
@settings(max_examples=20)
def test_more_memory_never_hurts_where_nothing_is_evicted(seed: int, budget: int) -> None:
    """LRU over items of two kinds is no stack algorithm, so only the ends are certain: nothing, and
    all of it."""
    requests = random_requests(seed, 40)

    def cached(size: int) -> int:
        target = build_target(RunConfig(SMALL, budget_bytes=size), unit=1)
        return sum(serve(target, requests, 1, SERVING).cached_tokens)

    everything = cached(10_000_000)
    assert cached(budget) <= everything == cached(20_000_000)


def test_too_little_memory_is_no_error() -> None:
    result = simulate(short().head(20), model=SMALL, gib=300 * 10 / 2**30)
    [run] = result.runs
    assert run.bypassed > 0 and run.cached_tokens == 0
    assert run.losses is not None and run.losses["refused"] > 0


def test_taking_memory_in_the_engines_pieces_changes_little() -> None:
    config = RunConfig(ModelGeometry.preset("qwen3-next"), budget_bytes=8 << 30)
    hits = [
        sum(serve(build_target(variant, 1), chat().head(160), 1, SERVING).cached_tokens)
        for variant in (config, replace(config, steps=EngineSteps()))
    ]
    assert hits[0] == pytest.approx(hits[1], rel=0.02)


def comparable(run: RunResult) -> RunResult:
    return replace(run, control_us=0.0)


def test_processes_change_nothing_and_a_sweep_resumes(tmp_path: Path) -> None:
    jobs = [
        Job(RunConfig(GEOMETRY, budget_bytes=size << 20, policy=policy), SERVING)
        for policy in ("lru", "tests.lab.test_simulate:Deepest")
        for size in (20, 40, 80)
    ]
    path = tmp_path / "runs.jsonl"
    alone = run_sweep(short(), jobs)
    done: list[tuple[int, int]] = []
    first = run_sweep(short(), jobs[:4], resume_from=path)
    path.write_text(path.read_text() + '{"key": "torn')
    both = run_sweep(
        short(), jobs, processes=2, resume_from=path, progress=lambda *at: done.append(at)
    )
    assert list(map(comparable, alone)) == list(map(comparable, both))
    assert both[:4] == first and done == [(5, 6), (6, 6)]
    assert run_sweep(short(), jobs, resume_from=path) == both


def test_figures_are_given_and_leave_the_backend_alone(tmp_path: Path) -> None:
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("svg")
    result = simulate("short?head=40", gib=(0.5, 1))
    drawn = [result.figure(), result.bins_figure(), result.losses_figure()]
    assert matplotlib.get_backend() == "svg" and pyplot.get_fignums() == []
    assert all(figure.get_axes() for figure in drawn)
    assert result.figure(tmp_path / "f.png") is not None and (tmp_path / "f.png").exists()


def test_a_sweep_leaves_the_garbage_collector_as_it_was() -> None:
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    seen = []
    run_sweep(
        short().head(3),
        [Job(RunConfig(GEOMETRY, budget_bytes=1 << 28), SERVING)],
        progress=lambda done, total: seen.append(gc.get_threshold()),
    )
    assert seen == [before] == [gc.get_threshold()] and gc.get_freeze_count() == frozen


def test_a_trace_file_that_changed_is_simulated_again(tmp_path: Path) -> None:
    path, trace = tmp_path / "runs.jsonl", tmp_path / "trace.jsonl"
    lines = [
        json.dumps({"timestamp": n, "session": n, "tokens": [*range(n, 200)], "output_length": 1})
        for n in range(3)
    ]

    def requests(kept: list[str], head: str) -> int:
        trace.write_text("\n".join(kept) + "\n")
        [run] = simulate(
            f"{trace}{head}", model=GEOMETRY, gib=1, bound=False, resume_from=path
        ).runs
        return run.requests

    assert [requests(lines[:2], head) for head in ("", "?head=9", "", "?head=9")] == [2] * 4
    assert len(path.read_text().splitlines()) == 2, "the same file again is not"
    assert [requests(lines, head) for head in ("", "?head=9")] == [3, 3]


class Deepest(EvictionPolicy):
    """A policy of one's own: the deepest candidate goes first."""

    def __init__(self) -> None:
        self.items: list[object] = []

    def add(self, item: object) -> None:
        self.items.append(item)

    def discard(self, item: object, evicted: bool) -> None:
        self.items.remove(item)

    def victim(self, kind: str | None):
        fitting = [item for item in self.items if kind in (None, item.kind)]
        return max(fitting, key=lambda item: (item.position, item.serial), default=None)


def test_a_models_own_precision_is_kept_unless_another_is_asked_for() -> None:
    halved = ModelGeometry.preset("qwen3-next", state_dtype="bfloat16")
    for asked, found in ((None, "bfloat16"), ("int8", "int8")):
        result = simulate("short?head=5", model=halved, gib=1, state_dtype=asked)
        assert result.runs[0].config.state_dtype == found == result.geometry.state_dtype


def test_every_result_says_how_memory_is_shared() -> None:
    runs = [
        simulate("short?head=60", gib=2, bound=False, **words).runs[0]
        for words in ({}, {"memory": "budget"}, {"memory": "pools", "kv_share": 0.5})
    ]
    assert [run.config.memory for run in runs] == ["arena", "budget", "pools"]
    assert [run.label for run in runs] == [
        "survival",
        "survival (budget)",
        "survival (pools 50% KV)",
    ]
    assert [run.gib for run in runs] == [2, 2, 2]
    assert runs[0].moved_slabs is not None and runs[1].moved_slabs is runs[2].moved_slabs is None
    [peer] = simulate("short?head=60", gib=2, bound=False, policy=(), baseline="vllm").runs
    assert peer.config.memory is None
    with pytest.raises(ValueError, match="give --kv-share between 0 and 1"):
        simulate("short?head=60", gib=2, memory="pools")
    for words in ({"kv_share": 0.5}, {"memory": "budget", "kv_share": 0.5}):
        with pytest.raises(ValueError, match="a share is of pools"):
            simulate("short?head=60", gib=2, **words)
    with pytest.raises(ValueError, match="none of arena, budget, pools"):
        simulate("short?head=60", gib=2, memory="ram")


def test_pools_share_out_one_size() -> None:
    config = RunConfig(SMALL, budget_bytes=100_000, memory="pools", kv_share=0.25)
    num_kv_tokens, num_slots = config.pools
    assert num_kv_tokens == 25_000 // SMALL.kv_bytes_per_token
    assert num_slots == 75_000 // SMALL.state_bytes
    half = replace(config, kv_share=0.5)
    assert half.pools == (50_000 // SMALL.kv_bytes_per_token, 50_000 // SMALL.state_bytes)


def test_sizes_in_words() -> None:
    assert len(sizes("2:200:15")) == 15 and sizes("2:200:15")[-1] == 200
    assert sizes("6,40") == (6, 40) and sizes(3) == (3.0,) and sizes([1, 2]) == (1.0, 2.0)


def test_a_result_survives_json() -> None:
    result = simulate("short", gib=0.05, model="qwen3.5-0.8b")
    [run] = result.runs
    assert RunResult.from_record(json.loads(json.dumps(run.as_record()))) == run


def test_the_figures_of_a_run_fit_together() -> None:
    [run] = simulate("chat", gib=8).runs
    assert run.losses is not None and run.bound_tokens is not None
    assert sum(run.losses.values()) + run.cached_tokens == run.prompt_tokens
    assert sum(bin_.cached_tokens for bin_ in run.by_length) == run.cached_tokens
    assert sum(bin_.requests for bin_ in run.by_turn) == run.requests == 320
    geometry = ModelGeometry.preset("qwen3-next")
    prompts = [len(request.tokens) for request in chat()]
    assert run.flops + run.flops_saved == sum(geometry.flops(0, length) for length in prompts)
    assert run.cached_tokens <= run.bound_tokens
    assert run.ttft_s[5] <= run.ttft_s[50] <= run.ttft_s[99]


def test_a_million_requests_need_eighty_megabytes() -> None:
    log = serve(build_target(RunConfig(GEOMETRY, budget_bytes=1 << 28), 1), short(), 1, SERVING)
    held = [log.arrival_s, log.prompt_tokens, log.cached_tokens, log.missed_tokens, log.turns]
    assert sum(column.itemsize for column in held) + 8 <= 80


GOLDEN_PEERS = ["vllm", "sglang", "lightllm", "marconi"]


def test_two_caches_never_share_a_row() -> None:
    coarse = simulate("short?head=40", gib=[1.0], bound=False)
    fine = simulate("short?head=40", gib=[1.0, 2.0], grid=1, bound=False)
    both = coarse.beside(fine)
    assert [*both.by_label()] == ["survival (grid 64)", "survival (grid 1)"]
    header, _, first, second, *_ = both.table().splitlines()[1:]
    assert header.split()[-2:] == ["1", "2"]
    assert first.split()[-1] == "-" and len(second.split()) == 5
    lru, bare = (
        simulate("short?head=40", gib=1, policy="lru", priority_classes=classes, bound=False)
        for classes in (True, False)
    )
    assert [*lru.beside(bare).by_label()] == [
        "lru (priority_classes True)",
        "lru (priority_classes False)",
    ]
    again = coarse.beside(coarse).by_label()
    assert [len(runs) for runs in again.values()] == [1]
    with pytest.raises(ValueError, match="different traces"):
        coarse.beside(simulate("short?head=40&seed=3", gib=[1.0], bound=False))
    with pytest.raises(ValueError, match="two competitors are called 'lru'"):
        simulate("short?head=9", gib=1, policy=["lru", "lru"])


def test_a_result_says_what_it_is_of(tmp_path: Path) -> None:
    options = {"gib": 1, "grid": 128, "page_size": 16, "servers": 2, "max_running": 3}
    result = simulate("short?seed=3&head=20", policy=["sieve", "survival"], **options)
    result.write_jsonl(tmp_path / "runs.jsonl")
    records = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [RunResult.from_record(record) for record in records] == list(result.runs)
    config = result.runs[0].config
    assert config.trace == "short?seed=3&boundaries=true&head=20"
    assert (config.gib, config.grid, config.page_size, config.memory) == (1.0, 128, 16, "arena")
    assert (config.servers, config.max_running, config.tpot_s) == (2, 3, 0.02)
    assert config.times.startswith("a roofline of")
    assert [run.config.priority_classes for run in result.runs] == [True, False]
    assert (
        "priority classes (unreachable KV, superseded checkpoints, the rest): sieve\n"
        in result.table()
    )
    assert "no priority classes, the policy orders all: survival" in result.table()


def test_traces_that_differ_have_different_names_in_full() -> None:
    specs = ("chat", "chat?seed=3", "chat?head=9", "chat?seed=3&head=9")
    assert len({open_trace(spec).full_name for spec in specs}) == 4
    assert {open_trace(spec).name for spec in specs} == {"chat"}
    for spec in specs:
        full_name = open_trace(spec).full_name
        assert open_trace(full_name).full_name == full_name


def test_a_trace_that_can_not_be_sent_is_one_sentence(tmp_path: Path) -> None:
    own = Trace("mine", 1, lambda: iter(open_trace("short?head=9")))
    assert simulate(own, gib=1, bound=False).runs[0].requests == 9
    for option in ({"processes": 2}, {"resume_from": tmp_path / "runs.jsonl"}):
        with pytest.raises(ValueError, match="trace 'mine' can not be sent to another process"):
            simulate(own, gib=(1, 2), **option)


def test_options_are_the_fields_of_a_sweep() -> None:
    sweep = Sweep(gib=1, policy="fifo", bound=False)
    one, other = simulate("short?head=9", sweep), simulate("short?head=9", sweep, policy="lru")
    assert [one.runs[0].label, other.runs[0].label] == ["fifo", "lru"]
    with pytest.raises(TypeError, match="polcy"):
        simulate("short?head=9", polcy="lru")


GOLDEN_FILES = {
    "budget": Path(__file__).parent / "golden_hits.json",
    "arena": Path(__file__).parent / "golden_hits_arena.json",
}
GOLDEN_TRACES = {
    "mooncake": (f"{SAMPLES / 'mooncake.jsonl.gz'}?head=250", (20, 60)),
    "coding-agent": (f"{SAMPLES / 'coding_agent.jsonl.gz'}", (4, 12)),
    "sharegpt-counts": (f"{SAMPLES / 'sharegpt_counts.jsonl.gz'}?head=150", (4, 16)),
    "chat": ("chat?head=200", (4,)),
    "agent-tree": ("agent-tree?tasks=4", (2, 6)),
}


def golden_hits(trace: str, memory: str) -> dict[str, list[int]]:
    """Cached tokens of each competitor at each size: every eviction with rules that learn nothing,
    and the default pair as ``survival @ adaptive``. Peers manage memory in their own way: they
    stand next to the ideal budget."""
    spec, gib = GOLDEN_TRACES[trace]
    kept = open_trace(spec).kept()
    shared = {"gib": gib, "bound": False, "memory": memory}
    peers = GOLDEN_PEERS if memory == "budget" else []
    static = "branch,boundary,backoff,end"
    result = simulate(kept, policy=sorted(EVICTION), checkpoints=static, baseline=peers, **shared)
    ours = simulate(kept, **shared)
    assert [run.config.policy for run in ours.runs] == ["survival"] * len(gib)
    hits = {
        label.removesuffix(" (budget)").removesuffix(f" @ {static}"): runs
        for label, runs in result.by_label().items()
    }
    return {
        label: [run.cached_tokens for run in runs]
        for label, runs in (*hits.items(), ("survival @ adaptive", ours.runs))
    }


@pytest.mark.full("chat-budget", "coding-agent-arena")
@pytest.mark.parametrize("memory", list(GOLDEN_FILES))
@pytest.mark.parametrize("trace", list(GOLDEN_TRACES))
def test_golden_hit_counts(trace: str, memory: str) -> None:
    """Pins policy, trace and size to the token. After a change that is meant, write them anew with
    ``python -m tests.lab.test_simulate``."""
    golden = json.loads(GOLDEN_FILES[memory].read_text())[trace]
    assert golden_hits(trace, memory) == golden


@pytest.fixture(scope="module")
def small() -> SimulationResult:
    return simulate("short?head=30", gib=[1, 2], policy=["lru", "fifo"], baseline=["vllm"])


def test_a_result_is_one_line_and_names_its_best_run(small: SimulationResult) -> None:
    best = max(small.runs, key=lambda run: run.token_hit_rate)
    for shown in (repr(small), str(small)):
        assert "\n" not in shown and len(shown) < 200
        assert "3 competitors, 2 sizes" in shown and "30 requests" in shown
        assert f"{100 * best.token_hit_rate:.1f} %" in shown
    assert len(repr(best)) < 100 and best.label in repr(best)
    assert "no runs" in repr(replace(small, runs=()))


def test_a_notebook_shows_every_rate(small: SimulationResult) -> None:
    html = small._repr_html_()
    table = ElementTree.fromstring(html)  # every element is closed
    rows = [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]
    assert [row[0] for row in rows[1:]] == [*small.by_label()]
    for row, runs in zip(rows[1:], small.by_label().values(), strict=True):
        assert row[2:] == [f"{100 * run.token_hit_rate:.1f}" for run in runs]
    assert len(list(table.iter("svg"))) == 3
    odd = replace(small.runs[0], config=replace(small.runs[0].config, label="<b>&"))
    assert "<b>&<" not in replace(small, runs=(odd,))._repr_html_()


def test_the_rows_of_a_result_are_flat_and_complete(small: SimulationResult) -> None:
    rows = small.to_dicts()
    assert len(rows) == len(small.runs) and len({frozenset(row) for row in rows}) == 1
    assert all(
        value is None or isinstance(value, str | int | float)
        for row in rows
        for value in row.values()
    )
    for row, run in zip(rows, small.runs, strict=True):
        assert (row["label"], row["gib"]) == (run.label, run.gib)
        lost = [row[f"lost_{cause}"] for cause in Losses._fields]
        if run.config.baseline:
            assert lost == [None] * len(lost)
        else:
            assert row["cached_tokens"] + sum(lost) == row["prompt_tokens"]
    json.dumps(rows)


@pytest.mark.parametrize("package", ["pandas", "polars"])
def test_frames_come_from_packages_that_may_be_missing(
    package: str, small: SimulationResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = ModuleType(package)
    stand_in.DataFrame = lambda rows, **_: ("frame", rows)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package, stand_in)
    convert = getattr(small, f"to_{package}")
    assert convert() == ("frame", small.to_dicts())
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {package}"):
        convert()


if __name__ == "__main__":
    # One trace a line, so that a change of one policy reads as such.
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


def test_checkpoints_in_fewer_bits_hold_more(tmp_path: Path) -> None:
    """The format is part of a run's identity, so a file of one format's runs is not the other's."""
    found = {
        word: simulate(
            "short",
            gib=1.0,
            bound=False,
            checkpoint_dtype=word,
            resume_from=tmp_path / "runs.jsonl",
        ).runs[0]
        for word in ("auto", "int8")
    }
    assert found["int8"].token_hit_rate > found["auto"].token_hit_rate
    assert [run.config.checkpoint_dtype for run in found.values()] == ["auto", "int8"]
