"""Tests of the studies: command lines, records with provenance, and figures."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from experiments import page, provenance, reproduce, sections
from experiments.benchmarks import measure_prefill
from experiments.provenance import read_json_lines, resumed
from experiments.sections import policies
from experiments.studies import (
    ablation,
    admission,
    capacity,
    closed_loop,
    compare,
    default,
    headroom,
    leaderboard,
    overload,
    peers,
    promises,
    tiers,
    vllm,
    yardsticks,
)
from experiments.studies import common as lab
from experiments.tables import Column, Table
from hybridcache import open_trace
from hybridcache.geometry.times import MeasuredTimes
from hybridcache.lab.board import Cell as BoardCell
from hybridcache.lab.board import Split
from hybridcache.lab.traces import SHIPPED, recognise
from hybridcache.lab.traces.intervals import Interval
from hybridcache.lab.traces.trace import Trace, TraceRequest
from hybridcache.policies.placement import Adaptive
from hybridcache.radix.protocol import Prefill
from hybridcache.radix.tokens import common_prefix_len
from tests.engine.front.server.conftest import oracle_engine
from tests.lab.traces.test_bad_traces import GOOD, written
from tests.policies.items import FakeItem


def test_the_study_of_promises_tells_truth_from_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promises, "SESSIONS", 12)
    for client in promises.CLIENTS:
        found = promises.requests(client, 0)
        last: dict[object, TraceRequest] = {}
        kept = []
        for request in found:
            before = last.get(request.session)
            if before is not None and before.returns_within_s is not None:
                kept.append(request.timestamp_s - before.timestamp_s <= before.returns_within_s)
            last[request.session] = request
        ends = {one.returns_within_s for one in last.values() if one.namespace == "A"}
        assert all(one.returns_within_s is None for one in found if one.namespace == "B")
        assert all(kept) == (client != "always")
        assert (ends == {None}) == (client in ("silent", "truthful"))
    jobs = [(own, 1.0, client, 0) for own in promises.NAMESPACES for client in promises.CLIENTS]
    records = [one for job in jobs for one in promises.serve(job)]
    assert len(promises.table(records).rows) == 8
    assert all(0 < one["hits_A"] < 1 and 0 < one["hits_B"] < 1 for one in records)


@pytest.mark.full("capacity")
@pytest.mark.parametrize("study", ["capacity", "grid", "arena"])
def test_study_writes_records(study: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(provenance, "WRITTEN", tmp_path)
    monkeypatch.setitem(lab.WORKLOADS, "short", lab.Workload("short?head=24", "1:4:2"))
    is_alone = study == "capacity"
    name = study if is_alone else "compare"
    monkeypatch.setattr(sys, "argv", [name, "--traces", "short", "--seeds", "5"])
    sys.argv += ["--processes", "1", *([] if is_alone else [study])]
    importlib.import_module(f"experiments.studies.{name}").main()
    head, *records = (tmp_path / f"study_{study}.jsonl").read_text().splitlines()
    assert "commit" in json.loads(head)["provenance"]
    for record in map(json.loads, records):
        rates = record["token_hit_rate"]
        assert record["trace"] == "short"
        assert all(0 <= rate <= 1 for rate in (rates if isinstance(rates, list) else [rates]))
    if study in ("grid", "arena"):
        monkeypatch.setattr(provenance, "RESULTS", tmp_path)
        table = page.SECTIONS[study].table()
        assert table.columns[0].name == "trace" and table.rows[0][0] == "short"
        assert " ± " in str(table)
    if study == "capacity":
        [ours] = [one for one in map(json.loads, records) if one["label"] == capacity.OURS]
        assert ours["seeds"] == 5 and len(ours["gain"]) == 2
        for low, high, (gain, least, most) in zip(
            *map(ours.get, ("low", "high", "gain")), strict=True
        ):
            assert 0 <= low <= high <= 1 and least <= gain <= most


def test_study_without_records_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(provenance, "WRITTEN", tmp_path)
    monkeypatch.setattr(lab, "DATA", (tmp_path,))
    for flags in ("--seeds 0", "--seeds -1", "--processes 0", "--traces mooncake"):
        monkeypatch.setattr(sys, "argv", ["compare", "arena", *flags.split()])
        with pytest.raises(SystemExit):
            compare.main()
    assert not [*tmp_path.iterdir()]


FORMATS = {
    "mini_swe_agent.jsonl.gz": "jsonl",
    "mooncake_conversation_trace.jsonl.gz": "mooncake",
    "oasst_trees.jsonl.gz": "jsonl",
    "sharegpt_qwen35_turns.jsonl.gz": "sharegpt-counts",
    "taubench_gpt-4o-airline.json.gz": "taubench",
    "toolbench_dfs.jsonl.gz": "jsonl",
    "weka_claude_code_train.rle.jsonl.gz": "coding-agent",
}
"""Format of each published trace."""


def named_traces() -> list[str]:
    """Return the specifications of all traces that the splits and the studies name."""
    splits = tomllib.loads((provenance.ROOT / "experiments" / "splits.toml").read_text())
    named = [file["trace"] for file in splits["stop-reasons"]["file"]]
    for split in ("tuning", "evaluation", "outside"):
        for kind in ("gib", "closed-loop", "files"):
            named += splits["default-pair"][split].get(kind, ())
    named += [workload.file for workload in admission.WORKLOADS.values() if workload.file]
    named += [workload.spec for workload in lab.WORKLOADS.values()]
    return [*dict.fromkeys(named)]


@pytest.mark.parametrize("spec", named_traces())
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


@pytest.mark.parametrize(
    "part",
    [part for part in reproduce.read_parts() if part.scope != "engine"],
    ids=lambda part: part.name,
)
def test_part_declares_the_published_files_that_its_study_reads(
    part: reproduce.Rebuilt, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[str] = set()
    monkeypatch.setattr(lab, "in_data", lambda spec: read.add(spec.partition("?")[0]))
    for module, name in ((lab, "measured"), (leaderboard, "board"), (peers, "measure")):
        monkeypatch.setattr(module, name, Mock(side_effect=SystemExit))  # The cells are known.
    command, *flags = part.command.split()
    monkeypatch.setattr(sys, "argv", [command, *flags])
    with pytest.raises(SystemExit):
        importlib.import_module(command).main()
    shipped = {f"{name.replace('-', '_')}.jsonl.gz" for name in SHIPPED}
    assert read - shipped == set(part.data)


def test_code_of_a_study_is_the_package_and_its_imports() -> None:
    code = provenance.simulation_code("experiments.studies.admission")
    own = ("provenance.py", "splits.toml", "tables.py")
    own += ("studies/admission.py", "studies/common.py")
    assert {*code} == {"hybridcache", *(f"experiments/{name}" for name in own)}


def test_studies_of_admission_agree_on_small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(admission.WORKLOADS["agents"], num_sessions=3)
    monkeypatch.setitem(admission.WORKLOADS, "agents", small)
    policies = (*overload.POLICIES, *admission.CACHES)
    records = [admission.serve(("agents", 1, 0.2, policy)) for policy in policies]
    table = admission.table([record for [record] in records])
    [row] = table.texts()
    windows = [overload.serve((3, policy, 1)) for policy in policies]
    [whole] = overload.table([record for [record] in windows]).texts()
    assert (row[:2], whole[:2]) == (["agents", "0.2"], ["3 sessions", "whole run"])
    assert row[2:4] == whole[2:4] and float(row[2]) > 80, "hits"
    assert float(row[5].split(", ")[3]) == pytest.approx(float(whole[-1]), abs=0.06)
    p99 = [f"{float(number):.1f}" for number in row[6].split(", ")]
    assert p99 == whole[8:11] and whole[-5] == "100.0, 100.0, 100.0"
    assert row[-3:] == whole[-4:-1] and float(row[-1]) >= max(map(float, row[-3:-1]))


def test_measured_times_that_fall_are_those_of_the_longer_prefill(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = measure_prefill.without_falls(np.array([[3.0, 1.0, 2.0], [1.1, 1.0, 4.0]]))
    assert found.tolist() == [[1.0, 1.0, 2.0], [1.0, 1.0, 4.0]]
    assert "use an idle machine" in capsys.readouterr().err
    measure_prefill.without_falls(np.array([[1.1, 1.0, 4.0]]))
    assert not capsys.readouterr().err


def test_measured_steps_are_a_table_for_simulations(tmp_path: Path) -> None:
    """Each length is measured after each reuse; a decode step has exactly the given requests."""
    engine = oracle_engine(max_running=4, checkpoints=("backoff",))
    now_s = itertools.count()
    engine.clock = lambda: float(next(now_s))
    record = measure_prefill.measure(engine, 600, 2)
    assert (record["starts"], record["lengths"]) == ([0, 512], [64, 128, 256, 512])
    assert record["decodes"] == [1, 4] and all(seconds > 0 for seconds in record["decode_s"])
    path = tmp_path / "times.json"
    path.write_text(json.dumps(record))
    steps = MeasuredTimes.load(path)
    seconds = max(record["table_s"][1][1], record["decode_s"][0])  # the clock counts its calls
    assert steps.step_seconds([(512, 640)], 0, 0) == seconds > 0

    mixed = measure_prefill.mixed_step_seconds(engine, 3, context=600)
    assert set(mixed) == set(measure_prefill.MIXED), "a step had other prefills or decodes"
    longer = closed_loop.MixedSteps(steps, 0.5)
    assert longer.step_seconds([(0, 64)], 2, 0) == steps.step_seconds([(0, 64)], 2, 0) + 0.5
    for step in (([(0, 64)], 0, 0), ([], 2, 0)):
        assert longer.step_seconds(*step) == steps.step_seconds(*step)


@pytest.mark.full
def test_the_engine_serves_what_the_closed_loop_study_forecasts() -> None:
    """One session at a time: processor time then cannot change hits."""
    runs = closed_loop.compare(("sessions", 0.005, 0), num_sessions=12, num_pauses=1)
    assert [run["source"] for run in runs] == ["engine", "forecast"]
    assert runs[0]["hit"] == pytest.approx(runs[1]["hit"], abs=1e-9) and runs[0]["hit"] > 50
    [row] = closed_loop.table(runs).texts()
    assert row[:4] == ["0.005", "sessions", f"{runs[0]['hit']:.1f}", "0.0"]


def test_yardsticks_are_in_tables_and_figures_of_policies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(lab.WORKLOADS, "short", lab.Workload("short?head=24", "0.2:4:2"))
    jobs = [
        default.TraceJob("evaluation", "short?head=24", seed, (0.2, 4.0), "short?head=24")
        for seed in (1, 2)
    ]
    jobs.append(default.TraceJob("capacity", "short", 0, (0.2, 4.0), "short"))
    records = [record for job in jobs for record in yardsticks.measure(job)]
    cells = yardsticks.by_cell(records)
    for (_, seed, gib), rates in cells.items():
        assert seed in (1, 2) and gib in (0.2, 4.0)
        assert rates[lab.LRU_ADAPTIVE] <= rates[lab.BOUND] <= 100
        assert rates[lab.BEST_REBUILT] <= rates[lab.BOUND]
    rates = {"vllm": [0.1, 0.4], "sglang": [0.2, 0.3], "marconi-static": [0, 0]}
    rates |= {"lru@adaptive": [0, 0], "upper bound": [1, 1]}
    fields = {"split": "tuning", "trace": "a", "seed": 0, "gib": [1, 2], "token_hit_rates": rates}
    best = [of[lab.BEST_REBUILT] for of in yardsticks.by_cell([fields]).values()]
    assert best == [20, 40] and not yardsticks.by_cell([fields], "capacity")
    loop = default.TraceJob("closed loop", "short", 1, (1.0,), "short?head=24", 4)
    [rates] = yardsticks.by_cell(yardsticks.measure(loop)).values()
    assert max(rates.values()) == rates[lab.BOUND] < 100
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    split = Split("tiny", "qwen3-next", (1, 2), (BoardCell("short?head=24", (0.2, 4.0)),))
    assert sections.yardstick_rates(split) == {} and sections.yardstick_cells() == {}
    provenance.write_json_lines(tmp_path / "yardsticks.jsonl", records)
    rates = sections.yardstick_rates(split)
    wanted = [cells["short?head=24", 1, gib][lab.BOUND] for gib in (0.2, 4.0)]
    assert rates[lab.BOUND][0] == pytest.approx(sum(wanted) / 2)
    assert sections.yardstick_rates(replace(split, seeds=(9,))) == {}, "another seed"
    curve = {"trace": "short", "gib": [0.2, 4.0], "low": [0.1, 0.2], "high": [0.2, 0.3]}
    runs = [curve | {"label": label} for label in (capacity.OURS, "lru")]
    provenance.write_json_lines(tmp_path / "study_capacity.jsonl", runs)
    figure = policies.CapacityCurves().draw(Table([Column("trace")], [["short"]]))
    assert len(figure.axes[0].lines) == 5 and "upper bound" in sections.svg(figure)


def test_lines_of_published_figures_differ_in_grey_also_with_many_points() -> None:
    points = [(float(x), x / 20, x / 20, x / 20) for x in range(1, 16)]
    figure = sections.panel_lines({"chat": [points] * 4}, "abcd", ("x", "y"))
    looks = {(str(line.get_linestyle()), line.get_marker()) for line in figure.axes[0].lines}
    assert len(looks) == 4 and all(line.get_markevery() for line in figure.axes[0].lines)


def test_tables_of_policies_have_a_column_for_each_reference() -> None:
    studies = admission, closed_loop, overload
    tables = compare.conditions_table, default.losses_table, tiers.over_seeds
    for make in (*(one.table for one in studies), *tables):
        references = {column.reference for column in make([]).columns}
        assert set(lab.YARDSTICKS) <= references, make


def test_cells_are_written_and_read_as_their_column_says() -> None:
    column = Column("hits", "%")
    cell = {"6 GiB": Interval(67.12, 66.93, 67.36)}
    assert (column.head, column.text(cell)) == ("hits, %", "6 GiB: 67.1 ± 0.3")
    assert column.values(cell) == [(67.1, 66.9, 67.4)]
    assert column.text([1.25, None, -0.04]) == "1.2, -, 0.0"
    assert [one.mean for one in column.values([1.26, -2])] == [1.3, -2]
    table = Table([Column("pair"), column], [["`a`", 1.26], ["b", None]])
    assert table.means("hits") == [1.3] and [*table.named("hits")] == ["a", "b"]
    assert table.markdown().splitlines()[-2:] == ["| `a` | 1.3 |", "| b | - |"]


def test_the_bound_in_any_order_counts_each_token_of_prompts_once() -> None:
    def turn(session: int, *tokens: int) -> TraceRequest:
        answer = np.array([9], np.int32)
        return TraceRequest(0.0, session, None, np.array(tokens, np.int32), answer)

    requests = turn(0, 1, 2, 3), turn(0, 1, 2, 3, 9, 4), turn(1, 1, 2, 5)
    rate = lab.bound_in_any_order(Trace("small", 1, requests.__iter__))
    assert rate == pytest.approx(1 - 5 / 11), "1 2 3 5 and 4 are computed, 9 was an answer"
    same = Trace("same", 1, ((turn(0, 1, 2),) * 2).__iter__)
    assert lab.bound_in_any_order(same) == 0.5, "and a token of each prompt"


def test_without_turnover_a_tip_still_moves_to_the_end() -> None:
    prefill = Prefill(200, 64, 64, 64, (), 64)
    prefill = prefill._replace(resumed=FakeItem("tip", label="decode", position=64))
    whole = Adaptive()._end(prefill)
    assert whole is not None and ablation.Without("turnover")._end(prefill) == whole


def test_the_ablation_measures_rules_constants_and_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(ablation.CONSTANTS) <= 18, "numbers of the default pair are choices: remove one"
    assert {"MARGIN", "TRIAL_OF_END", "UNUSED"} <= {*ablation.CONSTANTS}
    monkeypatch.setattr(ablation, "CONSTANTS", ("SAMPLE", "TRIAL_OF_END"))
    monkeypatch.setattr(ablation, "WINDOWS", (0, 20, 40))
    job = default.TraceJob("tuning", "chat?head=60", 0, (0.5, 1.0), "chat?head=60")
    records = ablation.measure((job, job))
    changes = {row[0]: row[1:] for row in ablation.table(records).texts()}
    assert changes["`SAMPLE` times 0.5"] == ["+0.00", "+0.0"], "fewer items than a sample"
    assert changes["without the rule *room*"][0] != "+0.00"
    rows = ablation.learning_table(records).texts()
    assert [row[0] for row in rows] == ["start"] * 5 + ["change"] * 5
    assert min(float(row[2]) for row in rows[:5]) < 30 and ablation.survival.SAMPLE == 1024


def test_records_with_the_same_settings_are_not_made_again(tmp_path: Path) -> None:
    file, made = tmp_path / "one.jsonl", list[int]()

    def measured(jobs: Sequence[int]) -> Iterator[dict[str, int]]:
        for size in jobs:
            made.append(size)
            yield {"size": size}

    def run(code: str, **jobs: int) -> list[dict[str, Any]]:
        return resumed(file, {"code": code}, jobs, measured)

    assert run("one", b=2) == [{"name": "b", "size": 2}]
    assert run("one", a=1, b=2, c=3) == read_json_lines(file)[1] and made == [2, 1, 3]
    assert [one["size"] for one in run("another", a=1, b=2)] == [1, 2] and made[3:] == [1, 2]


def test_the_future_knows_the_next_use_and_the_positions_that_are_resumed_from() -> None:
    requests = list(open_trace("short?head=40"))
    future = headroom.Future(requests, grid := 16)
    whole = [np.concatenate((one.tokens, one.output)) for one in requests]
    resumed: list[set[int]] = [set() for _ in requests]
    for number, request in enumerate(requests):
        most = len(request.tokens) - 1
        shared = [min(common_prefix_len(request.tokens, text), most) for text in whole[:number]]
        if depth := max(shared, default=0) // grid * grid:
            for earlier in np.flatnonzero(np.array(shared) >= depth):
                resumed[earlier].add(depth)
    assert future.resumed == resumed and any(resumed)
    rng, found = np.random.default_rng(1), 0
    for _ in zip(range(30), future, strict=False):
        number = int(rng.integers(len(requests)))
        length = int(rng.integers(1, len(whole[number])))
        later = (
            at
            for at, one in enumerate(requests)
            if at > future.now
            and len(one.tokens) > length
            and common_prefix_len(one.tokens, whole[number]) >= length
        )
        use = next(later, None)
        assert future.next_use(number, length) == use
        found += use is not None
    assert 0 < found < 30


def test_a_run_that_knows_a_fact_is_compared_with_one_that_knows_none() -> None:
    trace = open_trace("short?head=100")
    runs = {fact: headroom.run_with(fact, trace, 0.5) for fact in headroom.FACTS}
    plain = runs.pop(headroom.NOTHING)
    for fact, run in runs.items():
        difference = run.compare(plain)
        won = sum(row["tokens"] for row in difference.to_dicts())
        assert won == run.cached_tokens - plain.cached_tokens and difference.ours == fact
    assert runs[headroom.TIMES].cached_tokens > plain.cached_tokens
    assert runs[headroom.PLACES].cached_tokens > plain.cached_tokens
    ended = [one.stop_reason == "session_end" for one in headroom.told(trace)]
    assert sum(ended) == len({one.session for one in trace})
    alone = open_trace("few-shot?head=3")
    with pytest.raises(ValueError, match="no end of a session is known: name sessions"):
        headroom.run_with(headroom.ENDS, alone, 0.5)


def test_overload_in_vllm_shows_hits_and_time_of_each_cell():
    fields = {"trace": "long agents", "gib": 2, "seed": 0, "num_wrong": 0, "steps": 10}
    fields |= {"computed_tokens": 2000, "ttft_p95_s": 0.4}
    rates = {vllm.AS_IS: 0.1, **dict.fromkeys(vllm.FLAGS, 0.12), vllm.FIXED: 0.3, vllm.OURS: 0.25}
    records = [
        fields | {"variant": name, "hit_rate": rate, "ttft_mean_s": 0.3 if rate > 0.2 else 0.2}
        for name, rate in rates.items()
    ]
    found = vllm.overload_table(records)
    assert found.rows[0][3] == pytest.approx([10, 12, 30, 25])
    assert [one.mean for one in found.values("gain")] == pytest.approx([15])
    assert found.values("change of the mean TTFT")[0].mean == pytest.approx(50)
    for empty in (vllm.overload_table, vllm.host_table):
        with pytest.raises(FileNotFoundError):
            empty([])
