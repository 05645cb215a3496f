"""Tests of the kernel benchmark: all cases run without a GPU, and wrong kernels are not timed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from engine.runner.device import TRAITS
from experiments.gpu import kernels as bench_kernels
from experiments.gpu.kernel_cases import Case
from experiments.gpu.kernels import Clock, Machine, error, measure, row
from experiments.provenance import read_json_lines, write_json_lines

MACHINE = Machine("a machine", copy_bytes_s=1e9, gemm_flops_s=1e12)


class _Wall:
    """Fake of a torch device module, with events that read the wall clock."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time_s = time.perf_counter()

        def elapsed_time(self, end: _Wall.Event) -> float:
            return (end.time_s - self.time_s) * 1e3

    stream = "main"

    @staticmethod
    def synchronize() -> None:
        pass

    @classmethod
    def current_stream(cls) -> str:
        return cls.stream

    @classmethod
    def set_stream(cls, stream: str) -> None:
        cls.stream = stream


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(torch, "get_device_module", lambda device: _Wall)
    return Clock("cpu", scratch_bytes=8)


def _case(ours: float, rival: float) -> Case:
    return Case(
        name="a case",
        run=lambda: torch.full((4,), ours),
        expected=lambda: torch.ones(4),
        num_bytes=1000,
        num_flops=10**9,
        rivals={"rival": lambda: torch.full((4,), rival)},
    )


def test_correct_kernels_are_timed(clock: Clock) -> None:
    record = measure(_case(ours=1.001, rival=1.0), clock, MACHINE)
    assert record["is_right"]
    assert set(record["seconds"]) == {"ours", "rival"}
    assert record["limit_s"] == pytest.approx(1e-3)
    assert record["share_of_limit"] == pytest.approx(1e-3 / record["seconds"]["ours"])
    assert "of the limit  rival" in row(record)


def test_kernels_that_can_be_captured_are_timed_as_graphs(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that cannot be captured is called directly, and may be limited by the host."""
    calls = {"replays": 0, "waits": 0}

    def waits() -> torch.Tensor:
        calls["waits"] += 1
        return torch.ones(4)

    def record(work):
        if work is waits:
            _Wall.set_stream("of the capture")
            raise RuntimeError("operation not permitted when stream is capturing")

        def replay():
            calls["replays"] += 1

        return replay

    class WithGraphs:
        traits = TRAITS["cuda"]

        def recorder(self):
            return record

    monkeypatch.setattr(clock, "_resolved", WithGraphs())
    case = replace(_case(ours=1.0, rival=1.0), rivals={"waits": waits})
    clock.cover_s = 0.0
    found = measure(case, clock, MACHINE)
    assert found["not_captured"] == found["host_bound"] == ["waits"]
    assert "waits HOST-BOUND" in row(found)
    assert _Wall.stream == "main"
    assert set(found["host_s"]) == {"ours", "waits"} and min(found["host_s"].values()) > 0
    timed = bench_kernels.ROUNDS * bench_kernels.CALLS
    assert calls["replays"] == timed + 1 and calls["waits"] >= timed
    clock.cover_s = 60.0
    found = measure(case, clock, MACHINE)
    assert found["not_captured"] == ["waits"] and not found["host_bound"]
    assert "HOST-BOUND" not in row(found)


def test_wrong_kernel_is_not_timed(clock: Clock) -> None:
    record = measure(_case(ours=1.5, rival=1.0), clock, MACHINE)
    assert not record["is_right"]
    assert set(record["seconds"]) == {"rival"}
    assert "WRONG (5.0e-01)" in row(record)


def test_wrong_rival_is_not_timed(clock: Clock) -> None:
    record = measure(_case(ours=1.0, rival=0.0), clock, MACHINE)
    assert set(record["seconds"]) == {"ours"}
    assert "rival WRONG" in row(record)


def test_rival_that_raises_is_reported(clock: Clock) -> None:
    def absent() -> torch.Tensor:
        raise ValueError("no such thing\nand a traceback")

    case = replace(_case(ours=1.0, rival=1.0), rivals={"absent": absent})
    record = measure(case, clock, MACHINE)
    assert record["failures"] == {"absent": "ValueError: no such thing"}
    assert set(record["seconds"]) == {"ours"}
    assert "absent FAILED" in row(record)


def test_rival_may_have_a_larger_tolerance(clock: Clock) -> None:
    case = replace(_case(ours=1.0, rival=1.05), rival_tolerance=6e-2)
    assert set(measure(case, clock, MACHINE)["seconds"]) == {"ours", "rival"}
    case = replace(_case(ours=1.05, rival=1.05), rival_tolerance=6e-2)
    assert set(measure(case, clock, MACHINE)["seconds"]) == {"rival"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_error_of_non_finite_values_is_infinite(value: float) -> None:
    assert error(torch.tensor([1.0, value]), torch.ones(2)) == float("inf")


def test_nothing_is_timed_without_a_device() -> None:
    record = measure(_case(ours=1.0, rival=1.0), None, None)
    assert record["seconds"] == "not measured"
    assert row(record).endswith("not measured")


def test_a_case_that_raises_costs_its_own_record(tmp_path, monkeypatch) -> None:
    """Finished records of the same settings are not made again."""

    def broken() -> torch.Tensor:
        raise RuntimeError("out of shared memory\nand a traceback")

    good = [replace(_case(ours=1.0, rival=1.0), name=name) for name in ("first", "last")]
    listed = [good[0], replace(good[0], name="broken", run=broken), good[1]]
    monkeypatch.setattr(bench_kernels, "cases", lambda folder, setup: iter(listed))
    file, calls = tmp_path / "a.jsonl", []

    def work(case: Case) -> dict[str, object]:
        calls.append(case.name)
        return bench_kernels.check(case)

    records = list(bench_kernels.run_folder("a", None, work, file, {"code": "1"}))
    assert [record["is_right"] for record in records] == [True, False, True]
    assert records[1]["failures"] == {"ours": "RuntimeError: out of shared memory"}
    assert read_json_lines(file)[1] == records
    assert list(bench_kernels.run_folder("a", None, work, file, {"code": "1"})) == records
    assert calls == ["first", "broken", "last"]
    list(bench_kernels.run_folder("a", None, work, file, {"code": "2"}))
    assert len(calls) == 6


def test_inputs_that_cannot_be_made_are_recorded(tmp_path, monkeypatch) -> None:
    def listed(folder, setup):
        yield _case(ours=1.0, rival=1.0)
        raise ValueError("no memory")

    monkeypatch.setattr(bench_kernels, "cases", listed)
    records = list(bench_kernels.run_folder("a", None, bench_kernels.check, None, {}))
    assert [record["case"] for record in records] == ["a case", "inputs"]
    assert records[1]["failures"] == {"ours": "ValueError: no memory"}


def test_a_process_that_dies_costs_one_case(tmp_path, monkeypatch) -> None:
    """The second process continues after the case in which the first one ended."""
    file, runs = tmp_path / "check_kernels_norm.jsonl", []

    def run(command, **_):
        runs.append(command)
        known = bench_kernels.known_records(file, {"code": "1"})
        if not known:
            records = [{"case": "one", "is_right": True}, {"case": "two", "begun": True}]
            write_json_lines(file, records, {"code": "1"})
            return SimpleNamespace(returncode=-11)
        assert set(known) == {"one", "two"} and not known["two"]["is_right"]
        assert known["two"]["failures"]["ours"].endswith("the process ended with status -11")
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(bench_kernels, "subprocess", SimpleNamespace(run=run))
    assert not bench_kernels.run_each(["norm"], [], "check_kernels", tmp_path)
    assert len(runs) == 2


def test_a_folder_whose_process_cannot_begin_is_left(tmp_path, monkeypatch) -> None:
    runs = []

    def run(command, **_):
        runs.append(command)
        return SimpleNamespace(returncode=-9)

    monkeypatch.setattr(bench_kernels, "subprocess", SimpleNamespace(run=run))
    assert not bench_kernels.run_each(["norm", "gdn"], [], "check_kernels", tmp_path)
    assert len(runs) == 4


def test_calls_with_other_bits_are_counted() -> None:
    results = iter([1.0, 1.0, 2.0, 1.0])
    case = replace(_case(ours=1.0, rival=1.0), run=lambda: torch.full((4,), next(results)))
    record = bench_kernels.repeat(case, 3)
    assert record["calls_with_other_bits"] == 1 and not record["is_right"]
    nan = replace(case, run=lambda: torch.full((4,), torch.nan))
    assert bench_kernels.repeat(nan, 2)["is_right"]


@pytest.mark.full
def test_all_cases_and_installed_rivals_are_correct(tmp_path) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "experiments.gpu.kernels", "--dry", "--out", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr[-4000:]
    counts, num_cases = json.loads(run.stdout.splitlines()[-1]), 0
    for folder in bench_kernels.folders():
        _, records = read_json_lines(tmp_path / f"bench_kernels_{folder}.jsonl")
        assert {record["machine"] for record in records} == {"not measured"}
        assert {record["seconds"] for record in records} == {"not measured"}
        assert max(max(record["errors"].values()) for record in records) < 6e-2
        num_cases += len(records)
    assert counts == {"right": num_cases, "wrong": 0, "failed rivals": 0}


@pytest.mark.full
def test_candidates_of_the_tuner_are_correct(tmp_path) -> None:
    """Only kernels tuned by the number of tokens are run here; their results must be bit-identical.
    Run the others by hand with --mode tune."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "experiments.gpu.kernels", "--mode", "tune", "--dry"]
    command += ["--kernels", "linear,state_copy", "--out", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr[-4000:]
    _, records = read_json_lines(tmp_path / "tune_kernels.jsonl")
    assert {r["kernel"] for r in records} == {"linear.linear_kernel", "state_copy.copy_kernel"}
    assert all(r["refused"] == [] and r["right"] > 1 and r["chosen"] is None for r in records)
