"""Tests of the studies: command lines, records with provenance, and figures."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from engine import Engine, EngineConfig
from engine.text.tokenizer import ByteTokenizer
from experiments import page, provenance, reproduce
from experiments.benchmarks import measure_prefill
from experiments.studies import (
    admission,
    capacity,
    closed_loop,
    default,
    hints,
    overload,
    shadows,
    tiers,
)
from experiments.studies import common as lab
from hybridcache import open_trace
from hybridcache.geometry.times import MeasuredTimes
from hybridcache.lab.leaderboard import Split
from hybridcache.lab.simulation.step_times import MeasuredSteps
from hybridcache.lab.traces import recognise
from tests.lab.test_bad_traces import GOOD, written
from tests.oracle import OracleRunner, OracleSampler

STUDIES = ("capacity", "grid", "arena")


@pytest.mark.full("capacity")
@pytest.mark.parametrize("study", STUDIES)
def test_study_writes_records(study: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    monkeypatch.setattr(provenance, "FIGURES", tmp_path)
    monkeypatch.setitem(lab.WORKLOADS, "short", lab.Workload("short?head=24", "1:4:2"))
    monkeypatch.setattr("sys.argv", [study, "--traces", "short", "--points", "2"])
    sys.argv += ["--seeds", "5"]
    importlib.import_module(f"experiments.studies.{study}").main()
    head, *records = (tmp_path / f"study_{study}.jsonl").read_text().splitlines()
    assert "commit" in json.loads(head)["provenance"]
    for record in map(json.loads, records):
        rates = record["token_hit_rate"]
        assert record["trace"] == "short"
        assert all(0 <= rate <= 1 for rate in (rates if isinstance(rates, list) else [rates]))
    if study in ("grid", "arena"):
        header, rows = page.SECTIONS[study].table()
        assert header[0] == "trace" and rows[0][0] == "short" and "[" in str(rows)
    if study == "capacity":
        [ours] = [one for one in map(json.loads, records) if one["label"] == capacity.OURS]
        assert ours["seeds"] == 5 and len(ours["gain"]) == 2
        for low, high, (gain, least, most) in zip(
            *map(ours.get, ("low", "high", "gain")), strict=True
        ):
            assert 0 <= low <= high <= 1 and least <= gain <= most


def test_tiers_of_a_trace_without_savings_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lab.WORKLOADS, "short", lab.Workload("short?head=60", "1:4:2"))
    monkeypatch.setitem(lab.WORKLOADS, "one", lab.Workload("short?head=1", "1:4:2"))
    records = [
        record
        for name in ("short", "one")
        for seed in range(5)
        for record in tiers.measure((name, seed, "lru", False))
    ]
    assert {record["cell"] for record in records} >= {"device 4", "device 20", "host 16"}
    [shares] = tiers.shares_by_trace(records, "lru", "host 16").values()
    assert len(shares) == 5 and all(0.5 < share <= 1.01 for share in shares)
    _, [row] = tiers.over_seeds(records, "lru")
    assert row[0] == "short" and "[" in row[2]


def test_without_hints_removes_only_boundaries() -> None:
    split = Split("tiny", "qwen3-next", (1, 2), {"short": (1.0,)})
    records = hints.measure(split)
    assert len(records) == 2 * len(hints.PAIRS)
    trace = open_trace("short?head=40")
    plain = hints.without_hints(trace)
    assert any(request.boundaries for request in trace)
    for one, other in zip(trace, plain, strict=True):
        assert other.boundaries == ()
        assert (other.tokens == one.tokens).all() and other.session == one.session
    gain = hints.gains(records)["lru, fixed rules"][1]
    assert gain.mean > 0, "hints must help, because each turn of a chat starts at a boundary"


FORMATS = {
    "mooncake_conversation_trace.jsonl.gz": "mooncake",
    "oasst_trees.jsonl.gz": "jsonl",
    "sharegpt_qwen35_turns.jsonl.gz": "sharegpt-counts",
    "taubench_gpt-4o-airline.json.gz": "taubench",
    "toolbench_dfs.jsonl.gz": "jsonl",
    "weka_claude_code_train.rle.jsonl.gz": "coding-agent",
}
"""Format of each published trace."""


@pytest.mark.parametrize("spec", reproduce.named_traces())
def test_named_trace_is_read_by_a_reader_or_generator(
    spec: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A small file of its format stands for a published trace, with the options of the studies."""
    name, _, _ = spec.partition("?")
    if "." in name:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        word = FORMATS[Path(name).name]
        written(tmp_path / name, word, GOOD[word])
        assert recognise(tmp_path / name) == word
        monkeypatch.setattr(lab, "DATA", (tmp_path,))
        spec = str(lab.published(spec)).replace("tokenizer=qwen3.5", "tokenizer=bytes")
    assert len(next(iter(open_trace(spec))).tokens)


def test_missing_workload_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lab.WORKLOADS, "absent", lab.Workload("x", "1:2:2", is_file=True))
    monkeypatch.setattr("sys.argv", ["study", "--traces", "absent,short"])
    options = lab.arguments("A study.")
    assert list(lab.workloads(options)) == ["short"]


def test_command_of_a_result_contains_no_local_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["study", "--resume", "/my/own", "--points", "2"])
    assert provenance.provenance()["command"] == "python study --points 2"


def test_published_trace_is_found_in_any_data_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second = tmp_path / "data", tmp_path / "shared"
    monkeypatch.setattr(lab, "DATA", (first, second))
    workload = lab.Workload("traces/one.jsonl?cap=99", "1:4:2", is_file=True)
    assert lab.published("traces/one.jsonl?cap=99") is None and not workload.is_available
    with pytest.raises(FileNotFoundError, match="traces/one"):
        workload.open("one", full=True)
    (second / "traces").mkdir(parents=True)
    (second / "traces" / "one.jsonl").touch()
    assert lab.published("traces/one.jsonl?cap=99") == f"{second}/traces/one.jsonl?cap=99"
    assert workload.is_available


def test_runs_of_other_code_are_not_resumed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`make reproduce` runs all cells of changed code, and resumes a stopped run of the same."""
    fields = dataclasses.fields(admission.ClosedLoopRun)
    run = admission.ClosedLoopRun(**{field.name: 1 for field in fields})  # type: ignore[arg-type]
    runs = [dataclasses.replace(run, admission=name) for name in ("oldest", "sessions", "live:4")]
    path = tmp_path / "admission.jsonl"
    monkeypatch.setattr(admission, "RESULTS", path)
    code = {"sessions": "a", "others": "b"}
    origin = {"commit": "c"}
    lines = [json.dumps(dataclasses.asdict(run)) for run in runs]
    path.write_text("\n".join((json.dumps({"provenance": origin, "code": code}), *lines)))
    assert admission.known_runs(code) == ([origin], runs)
    assert admission.known_runs(code | {"sessions": "new"}) == ([origin], [runs[0], runs[2]])
    assert admission.known_runs({"sessions": "new", "others": "new"}) == ([], [])
    hashes, read = admission.hashes(), Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == "session_gate.py")
    )
    changed = admission.hashes()
    assert changed["others"] == hashes["others"] and changed["sessions"] != hashes["sessions"]
    code = provenance.simulation_code("experiments.studies.admission")
    own = {"admission.py", "common.py"}
    assert {*code} == {
        "hybridcache",
        "experiments/provenance.py",
        "experiments/splits.toml",
        *(f"experiments/studies/{name}" for name in own),
    }


def test_pairs_are_compared_in_closed_loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    splits = {"evaluation": {"seeds": [100, 101], "closed-loop": {"short?head=40": [[0.5, 4]]}}}
    jobs = list(default.jobs_of("closed loop", splits, None))
    assert [(job.seed, job.gib, job.rate) for job in jobs] == [(100, (0.5,), 4), (101, (0.5,), 4)]
    records = [r for job in jobs for r in default.run("qwen3-next", default.COMPARED, job)]
    assert all(0 < r["ttft_mean_s"] < r["makespan_s"] for r in records)
    lab.keep("study_default", records)
    rows = {row[0]: row for row in page.pairs_table("closed loop")[1]}
    assert rows[f"`{default.DEFAULT}`"][3:] == ["1.00", "1.00", "1.00"]
    assert page.losses_table()[1][0][:2] == ["closed loop", "1"]


def test_measured_steps_are_a_table_for_simulations(tmp_path: Path) -> None:
    """Each length is measured after each reuse; a decode step has exactly the given requests."""
    config = EngineConfig(max_running=4, checkpoints=("backoff",))
    runner = OracleRunner(8192, 16, max_model_len=4096)
    engine = Engine(config, runner=runner, sampler=OracleSampler(), tokenizer=ByteTokenizer())
    now_s = itertools.count()
    engine.clock = lambda: float(next(now_s))
    record = measure_prefill.measure(engine, 600, 2)
    assert (record["starts"], record["lengths"]) == ([0, 512], [64, 128, 256, 512])
    assert record["decodes"] == [1, 4] and all(seconds > 0 for seconds in record["decode_s"])
    path = tmp_path / "times.json"
    path.write_text(json.dumps(record))
    steps = MeasuredSteps(MeasuredTimes.load(path))
    assert steps.step_seconds([(512, 640)], 0, 0) == record["table_s"][1][1] > 0

    mixed = measure_prefill.mixed_step_seconds(engine, 3, context=600)
    assert set(mixed) == set(measure_prefill.MIXED), "a step had other prefills or decodes"
    longer = closed_loop.MixedSteps(steps, 0.5)
    assert longer.step_seconds([(0, 64)], 2, 0) == steps.step_seconds([(0, 64)], 2, 0) + 0.5
    for prefills, num_decodes in (([(0, 64)], 0), ([], 2)):
        assert longer.step_seconds(prefills, num_decodes, 0) == steps.step_seconds(
            prefills, num_decodes, 0
        )


def test_study_without_closed_loops_has_no_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    lab.keep("study_default", [{"split": "tuning", "pair": default.DEFAULT, "seed": 1}])
    section = page.SECTIONS["pairs in closed loop"]
    assert page.render("pairs", section, {}).startswith("No results yet")


def test_published_trace_gets_intervals_over_sessions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    known = default.Job("evaluation", "traces/a.jsonl", None, (0.3, 1.0), "short?head=60")
    alone = default.Job("evaluation", "traces/b.jsonl", None, (1.0,), "few-shot?head=20")
    seeded = default.Job("evaluation", "short?head=20", 3, (0.3,))
    records = [
        record
        for job in (known, alone, seeded)
        for record in default.run("qwen3-next", default.COMPARED, job)
    ]
    for record in records:
        assert ("sessions" in record) == (record["seed"] is None)
        cached, prompt = map(sum, zip(*record.get("sessions", [[0, 1]]), strict=True))
        if record["seed"] is None:
            assert cached / prompt == pytest.approx(record["token_hit_rate"], abs=1e-5)
    lab.keep("study_default", records)
    first, _, last = page.published_table()[1]
    assert first[:2] == ["`a`", "0.3"] and "[" in first[3]
    assert last[:3] == ["`b`", "1", "unknown"] and "[" not in last[3]


def test_loss_is_the_distance_to_the_best_pair_of_each_cell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    rates = {default.DEFAULT: (0.5, 0.3, 0.4), default.PAIRS[0]: (0.4, 0.5, 0.6)}
    lab.keep(
        "study_default",
        [
            {"split": "tuning", "trace": "chat", "gib": 1, "seed": seed, "pair": pair}
            | {"token_hit_rate": rate}
            for pair, several in rates.items()
            for seed, rate in enumerate(several)
        ],
    )
    assert page.losses_table()[1] == [["tuning", "1", "10.0", "10.0", "0 of 1"]]


def test_windows_of_overload_do_not_depend_on_later_arrivals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(overload, "WARM_UP_S", 10.0)
    monkeypatch.setattr(overload, "WINDOW_S", 20.0)
    assert list(overload.windows(8)) == [(0.0, float("inf")), (10.0, 30.0)]
    assert [end for _, end in overload.windows(12)][1:] == [30.0, 50.0]
    records = overload.serve(("oldest", 8, 1))
    whole, window = records
    assert whole["requests"] > window["requests"] > 0 and whole["to_s"] is None
    header, rows = overload.table(records)
    assert [row[2] for row in rows] == ["whole run", "10 to 30 s"] and len(header) == len(rows[0])


def test_shadows_of_all_sessions_follow_the_better_pair(tmp_path: Path) -> None:
    """The second candidate reuses everything, the default nothing."""
    prompt = np.full(200, 1000)
    better = dict.fromkeys(shadows.CANDIDATES, 0 * prompt)
    better[shadows.CANDIDATES[1]] = prompt
    places = np.arange(200)
    rate = shadows.reached({"prompt": prompt} | better, places, better)
    assert rate == pytest.approx(100 * 199 / 200), "the first request decides"
    assert shadows.reached({"prompt": prompt} | better, places[:0], better) == 0.0

    cell = shadows.Cell("tuning", "short?head=60", 0.6, None, "short?head=60&seed=1")
    geometry = shadows.ModelGeometry.preset("qwen3-next")
    logs = shadows.logs_of(cell, geometry, tmp_path)
    again = shadows.logs_of(cell, geometry, tmp_path)
    assert {name: log.tolist() for name, log in again.items()} == {
        name: log.tolist() for name, log in logs.items()
    }
    found = shadows.figures(logs)
    assert 0 < found["rates"][default.DEFAULT] <= 100 and set(found["reached"]) > {"1"}
    record = cell._asdict() | found
    header, rows = shadows.table([record])
    assert len(rows) == 8 and all(len(row) == len(header) for row in rows)


@pytest.mark.full
def test_the_engine_serves_what_the_closed_loop_study_forecasts() -> None:
    """One session at a time: processor time then cannot change hits."""
    options = argparse.Namespace(sessions=12, max_running=4, repeats=1)
    runs = closed_loop.compare("sessions", 0.05, 0, options)
    assert [run["source"] for run in runs] == ["engine", "forecast"]
    assert runs[0]["hit"] == pytest.approx(runs[1]["hit"], abs=1e-9) and runs[0]["hit"] > 50
    _, [row] = closed_loop.table(runs)
    assert row[:4] == ["0.05", "sessions", f"{runs[0]['hit']:.1f}", "0.0"]
