"""Tests of the kernel benchmark: all cases run without a GPU, and wrong kernels are not timed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from experiments.gpu import kernels as bench_kernels
from experiments.gpu.kernel_cases import Case, Setup
from experiments.gpu.kernels import DeviceTimer, Machine, measure, row
from experiments.provenance import known_records, read_json_lines, write_json_lines
from kernels.tuning import using

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
def clock(monkeypatch: pytest.MonkeyPatch) -> DeviceTimer:
    monkeypatch.setattr(torch, "get_device_module", lambda device: _Wall)
    return DeviceTimer("cpu", scratch_bytes=8)


def _case(ours: float, rival: float) -> Case:
    return Case(
        name="a case",
        run=lambda: torch.full((4,), ours),
        expected=lambda: torch.ones(4),
        num_bytes=1000,
        num_flops=10**9,
        rivals={"rival": lambda: torch.full((4,), rival)},
    )


def test_only_correct_kernels_are_timed(clock: DeviceTimer) -> None:
    record = measure(_case(ours=1.001, rival=1.0), clock, MACHINE)
    assert record["is_right"]
    assert set(record["seconds"]) == {"ours", "rival"}
    assert record["limit_s"] == pytest.approx(1e-3)
    assert record["share_of_limit"] == pytest.approx(1e-3 / record["seconds"]["ours"])
    assert "of the limit  rival" in row(record)
    record = measure(_case(ours=1.5, rival=1.0), clock, MACHINE)
    assert not record["is_right"]
    assert set(record["seconds"]) == {"rival"}
    assert "WRONG (5.0e-01)" in row(record)


def test_a_process_that_dies_costs_one_case(tmp_path, monkeypatch) -> None:
    """The second process continues after the case in which the first one ended."""
    file, runs = tmp_path / "check_kernels_norm.jsonl", []

    def run(command, **_):
        runs.append(command)
        known = {r["case"]: r for r in known_records(file, {"code": "1"})}
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


def test_a_case_that_hangs_on_the_device_costs_one_case(tmp_path, monkeypatch) -> None:
    """The alarm ends the process of the second case, and the next process runs the third one."""
    file, settings, codes = tmp_path / "check_kernels_norm.jsonl", {"code": "1"}, []
    setup = SimpleNamespace(device="cuda", is_float32=False)
    names = ("first", "hangs", "last")
    monkeypatch.setattr(bench_kernels, "CASE_S", 1)
    monkeypatch.setattr(
        bench_kernels, "cases", lambda *_: [SimpleNamespace(name=name) for name in names]
    )

    def work(case):
        if case.name == "hangs":
            time.sleep(30)
        return {"case": case.name, "is_right": True}

    def run(command, **_):
        child = os.fork()
        if not child:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # The handler of pytest-timeout.
            list(bench_kernels.run_folder("norm", setup, work, file, settings))
            os._exit(1)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return SimpleNamespace(returncode=codes[-1])

    monkeypatch.setattr(bench_kernels, "subprocess", SimpleNamespace(run=run))
    assert not bench_kernels.run_each(["norm"], [], "check_kernels", tmp_path)
    assert codes == [-signal.SIGALRM, 1]
    records = known_records(file, settings)
    assert [(record["case"], record["is_right"]) for record in records] == [
        ("first", True),
        ("hangs", False),
        ("last", True),
    ]


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


def test_cases_of_square_states_differ_in_their_launches(monkeypatch) -> None:
    """A table of the device does not change them."""
    mamba2 = pytest.importorskip("experiments.gpu.kernel_cases.mamba2")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    launched = []
    monkeypatch.setattr(
        interpreter.GridExecutor,
        "__call__",
        lambda self, *_, num_warps, num_stages, **sizes: launched.append((num_warps, num_stages)),
    )
    with using({("mamba2.scan_kernel", (torch.bfloat16, 64, 64)): {"num_stages": 3}}):
        for case in islice(mamba2.cases(Setup("cpu", is_dry=False)), 3):
            case.run()
    # The interpreter has one stage for a scan.
    assert launched == [(4, 2), (4, 1), (2, 2), (2, 1), (4, 1), (4, 1)]


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
