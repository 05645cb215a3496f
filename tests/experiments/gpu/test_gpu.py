"""Tests of ``python -m experiments.gpu``: reports that the next call continues, processes that end,
and messages without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.gpu import __main__ as gpu
from experiments.gpu import serving
from experiments.provenance import read_json_lines
from hybridcache.geometry.units import GIB
from tests.engine.device_models import TINY, write_geometry
from tests.selection import ROOT
from tests.stub_device import stubbed

CASES = """
import os, time
from pathlib import Path
import pytest

FIXED = Path(__file__).with_name("fixed")
RUNS = Path(__file__).with_name("runs")

def test_right(record):
    RUNS.write_text(RUNS.read_text() + "x" if RUNS.exists() else "x")
    record(error=0.5)

def test_wrong():
    assert FIXED.exists()

def test_that_ends_its_process():
    FIXED.exists() or os._exit(70)

@pytest.mark.timeout(1)
def test_that_hangs():
    FIXED.exists() or time.sleep(60)

def test_last():
    pass
"""


def run(folder: Path) -> tuple[int, dict[str, str]]:
    """Run the cases once more. Returns the status, and the last outcome of each test."""
    (folder / "cases.py").write_text(CASES)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "experiments.gpu.report", "--report"]
    command += [folder / "report.jsonl", "-n", "1", "--dist", "load"]
    command += ["--timeout-method", "thread", f"--rootdir={folder}", folder / "cases.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    _, records = read_json_lines(folder / "report.jsonl")
    assert "error" not in records[0] or records[0]["error"] == 0.5, done.stdout
    return done.returncode, {one["test"].partition("::")[2]: one["outcome"] for one in records}


@pytest.mark.full
def test_a_report_is_continued_and_a_lost_process_costs_one_test(tmp_path: Path) -> None:
    status, outcomes = run(tmp_path)
    failed = ("test_wrong", "test_that_ends_its_process", "test_that_hangs")
    assert status == 1
    assert {name for name, outcome in outcomes.items() if outcome == "failed"} == {*failed}
    assert outcomes["test_right"] == outcomes["test_last"] == "passed"
    (tmp_path / "fixed").touch()
    status, outcomes = run(tmp_path)
    assert status == 0 and {*outcomes.values()} == {"passed"}
    assert (tmp_path / "runs").read_text() == "x"


def test_a_failed_part_fails_the_call_but_others_still_run(monkeypatch, capfd, tmp_path) -> None:
    status = {"check": 0, "bench": 1, "serve": 5}
    monkeypatch.setattr(gpu, "PARTS", {name: ((name,), "") for name in status})

    def pytest_of(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, status[command[-1]])

    monkeypatch.setattr(gpu.subprocess, "run", pytest_of)
    assert gpu.main(["--dry", "--out", str(tmp_path)]) == 1
    said = capfd.readouterr().out.splitlines()[-1]
    assert said == "check passed, bench failed, serve passed"


@pytest.mark.full
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="stubs the interpreter")
def test_speeds_are_measured_with_and_without_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stub device, which computes nothing, gives all records of the parts that need a GPU."""
    pytest.importorskip("triton")
    monkeypatch.setattr(serving, "IS_DRY", False)
    path = write_geometry(tmp_path, TINY)
    with stubbed(monkeypatch):
        bench = serving.Bench(path, serving.DRY)
        start = bench.start()
        for graphs in ("all", "decode", "off"):
            bench.use(graphs)
            decoding = bench.decoding(2)
            assert decoding["decode_steps"] > 0 and decoding["decode_step_ms_median"] > 0
            assert bench.hit()["cached"] == [64]
        priced = bench.price()
    assert "graphs" in start["warm_up"] and start["warm_up_bytes"] > 0
    assert (start["token_budget"], start["max_running"]) == (8192, 64)
    fast, exact = priced["without"], priced["exact"]
    assert fast["token_hit_rate"] > exact["token_hit_rate"] and priced["ttft_ratios"]


def test_a_large_model_is_measured_in_the_formats_that_fit() -> None:
    """An H100 has 79 GiB, an H200 139."""

    def fitting(gib: int, has_fp8: bool) -> list[str]:
        names = ("fp8", "int8", "int4-128")
        told = {name: serving.missing_for(name, gib * GIB, has_fp8=has_fp8) for name in names}
        return [name for name, missing in told.items() if not missing]

    assert fitting(79, True) == fitting(79, False) == ["int4-128"]
    assert fitting(139, True) == ["fp8", "int4-128"]
    assert fitting(139, False) == ["int8", "int4-128"]
    said = serving.missing_for("int4-128", 39 * GIB, has_fp8=True)
    assert said == "int4-128 needs 56 GiB; 39 GiB are free."
