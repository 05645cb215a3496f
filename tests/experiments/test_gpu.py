"""Tests of ``python -m experiments.gpu``: parts, their records and limits, and messages without a
GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.runner.model_runner import ModelRunner
from experiments import provenance
from experiments.gpu import __main__ as gpu
from experiments.gpu import serving as gpu_serving
from experiments.gpu.models import TINY, write_geometry, write_tokenizer
from experiments.provenance import read_json_lines, write_json_lines
from tests.engine.numerics.stub_device import stubbed

REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="one"><properties><property name="device" value="a GPU"/></properties></testcase>
<testcase classname="tests.a" name="two"><failure/></testcase>
<testcase classname="tests.b" name="three"><skipped/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Parts of one line of Python each."""
    lines = {"kernels": "pass", "bench": "pass", "big": "raise SystemExit(3)"}
    monkeypatch.setattr(
        gpu,
        "PARTS",
        {
            name: lambda out, dry, line=line: [sys.executable, "-c", line]
            for name, line in lines.items()
        },
    )
    monkeypatch.setattr(gpu, "code_hash", lambda: "0123456789ab")
    return lines


def run(out: Path, *arguments: str) -> int:
    return gpu.main(["--dry", "--out", str(out), *arguments])


def test_failed_part_fails_the_run_but_others_still_run(
    parts: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path) == 1
    assert (
        capfd.readouterr()
        .out.splitlines()[-1]
        .endswith(": kernels passed, bench passed, big failed")
    )
    _, [record] = read_json_lines(gpu.done_file(tmp_path, "big"))
    assert record["verdict"] == "failed"
    assert record["seconds"] >= 0


def test_only_failed_parts_run_again_with_the_same_code(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path) == 1
    assert [gpu.is_done(tmp_path, part) for part in parts] == [True, True, False]
    assert not gpu.is_done(tmp_path, "parity")
    (tmp_path / "bench.jsonl").touch()
    assert run(tmp_path, "--part", "bench") == 0
    assert (tmp_path / "bench.jsonl").exists()
    assert run(tmp_path, "--part", "bench", "--again") == 0
    assert not (tmp_path / "bench.jsonl").exists()  # Old records are deleted.
    monkeypatch.setattr(gpu, "code_hash", lambda: "ba9876543210")
    assert not gpu.is_done(tmp_path, "bench")


def test_code_hash_covers_code_but_not_results_and_docs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    for name in (
        "engine/a.py",
        "kernels/tuned.json",
        "experiments/results/gpu/b.json",
        "docs/c.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    before, hashes = provenance.code_hash(), {}
    for path in tmp_path.rglob("*.*"):
        path.write_text("2")
        hashes[path.name] = provenance.code_hash()
        path.write_text("1")
    assert {name for name, found in hashes.items() if found != before} == {"a.py", "tuned.json"}
    assert provenance.code_hash() == before


def test_results_are_packed_into_one_archive(parts: dict[str, str], tmp_path: Path) -> None:
    archive = tmp_path / "away" / "gpu.tar.gz"
    assert run(tmp_path / "here", "--tar", str(archive)) == 1  # includes that of a failed part
    with tarfile.open(archive) as found:
        assert {f"here/{part}.done.jsonl" for part in parts} < set(found.getnames())


@pytest.mark.parametrize(("interpret", "forbidden"), [("1", True), ("", False)])
def test_kernel_tests_on_a_device_reject_the_interpreter(interpret: str, forbidden: bool) -> None:
    """This holds even if /dev has no file of a GPU driver."""
    environment = dict(os.environ) | {"KERNELS_ON_DEVICE": "1", "TRITON_INTERPRET": interpret}
    code = "import tests.conftest, os; print(os.environ['TRITON_INTERPRET'])"
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=gpu.ROOT
    )
    assert ("KERNELS_ON_DEVICE=1 and TRITON_INTERPRET=1 exclude" in found.stderr) == forbidden
    assert forbidden or found.stdout == "\n"


def test_hanging_part_is_stopped(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpu.LIMITS_S, "big", 0.3)
    monkeypatch.setitem(gpu.PARTS, "big", lambda out, dry: ["sleep", "60"])
    assert gpu.run_part("big", tmp_path, dry=True) == "timed out"


@pytest.mark.full
def test_children_of_a_hanging_part_are_stopped(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpu.LIMITS_S, "big", 0.5)
    beacon = tmp_path / "beacon"
    shell = f"(sleep 1.5; touch {beacon}) & sleep 60"
    monkeypatch.setitem(gpu.PARTS, "big", lambda out, dry: ["sh", "-c", shell])
    assert gpu.run_part("big", tmp_path, dry=True) == "timed out"
    time.sleep(1.5)
    assert not beacon.exists()


def test_missing_test_packages_give_an_install_hint(
    parts: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert run(tmp_path) == 2
    assert "pip install pytest hypothesis" in capsys.readouterr().err
    assert run(tmp_path, "--part", "bench") == 0


def test_junit_reports_are_converted_to_records(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    assert gpu.test_records(report) == [
        {"file": "tests.a", "devices": ["a GPU"], "passed": 1, "failure": 1, "wrong": ["two"]},
        {"file": "tests.b", "devices": [], "skipped": 1, "wrong": []},
    ]


def test_missing_gpu_gives_a_hint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert gpu.main([]) == 2
    assert "--dry" in capsys.readouterr().err


@pytest.mark.parametrize("part", gpu.PARTS)
def test_each_part_has_a_command(part: str, tmp_path: Path) -> None:
    """The commands with and without --dry differ in one flag or in the selected tests."""
    dry, real = (gpu.PARTS[part](tmp_path, is_dry) for is_dry in (True, False))
    assert dry[:3] == real[:3]
    assert dry != real


def test_time_limits_of_parts_sum_to_at_most_25_minutes():
    assert gpu.LIMITS_S.keys() == gpu.PARTS.keys()
    assert sum(gpu.LIMITS_S.values()) <= 25 * 60 and max(gpu.LIMITS_S.values()) < 8 * 60


@pytest.mark.full
@pytest.mark.sources("kernels", "engine/runner", "engine/layers", "engine/models", "engine/weights")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="stubs the interpreter")
def test_speeds_are_measured_with_and_without_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stub device, which computes nothing, gives all records of the parts that need a GPU."""
    pytest.importorskip("triton")
    path = write_geometry(tmp_path, TINY)
    with stubbed(monkeypatch):
        records = list(gpu_serving.measure(path, False, gpu_serving.DRY))
    start, *measured = records
    assert "decode graphs" in start["warm_up"] and start["warm_up_bytes"] > 0
    assert (start["token_budget"], start["max_running"]) == (8192, 64)
    decoding = next(record for record in measured if record["measure"] == "decoding")
    assert decoding["decode_steps"] > 0 and decoding["decode_step_ms_median"] > 0
    speeds = [(r["measure"], r["graphs"]) for r in measured if "graphs" in r]
    measures = ("decoding", "prefix hit")
    assert speeds == [(m, graphs) for graphs in ("all", "decode", "off") for m in measures]
    fast, exact, ratio = (record for record in measured if record["measure"] == "exact")
    assert fast["token_hit_rate"] > exact["token_hit_rate"] and "ttft_ratio_median" in ratio


@pytest.mark.full
@pytest.mark.sources("kernels", "engine/runner", "engine/layers", "engine/models", "engine/weights")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="stubs the interpreter")
def test_draft_steps_are_measured_with_and_without_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    path, scale = write_geometry(tmp_path, TINY), replace(gpu_serving.DRY, streams=(1, 2, 8))
    with stubbed(monkeypatch):
        records = list(gpu_serving.drafted(path, False, scale))
    assert [(r["graphs"], r["streams"]) for r in records] == [
        (graphs, streams) for graphs in ("all", "pieces", "off") for streams in (1, 2, 4)
    ]
    assert list(gpu_serving.drafted(path, False, scale, records)) == records


@pytest.mark.full
@pytest.mark.sources("kernels", "engine/runner", "engine/layers", "engine/models", "engine/weights")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="stubs the interpreter")
def test_existing_records_of_the_same_code_are_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    path = write_geometry(tmp_path, TINY)
    with stubbed(monkeypatch):
        _, *first = gpu_serving.measure(path, False, gpu_serving.DRY)
        file = tmp_path / "big.jsonl"
        write_json_lines(file, [*first[:3], *first[-3:]], {"code": "abc"})
        assert gpu_serving.known_records(file, "other") == []
        assert gpu_serving.known_records(tmp_path / "none", "abc") == []
        known = gpu_serving.known_records(file, "abc")
        _, *second = gpu_serving.measure(path, False, gpu_serving.DRY, known)
    assert [r["measure"] for r in second] == [r["measure"] for r in first]
    assert [a == b for a, b in zip(second, first, strict=True)] == [
        index < 3 or index >= len(first) - 3 for index in range(len(first))
    ]


@pytest.mark.full
def test_load_test_uses_the_engine_directly_without_server_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_serving.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_serving, "all_fused", str)  # slow in the interpreter
    runners: list[weakref.ref[ModelRunner]] = []
    monkeypatch.setattr(gpu_serving, "Bench", checks_release(gpu_serving.Bench, runners))
    path = write_geometry(tmp_path, TINY)
    write_tokenizer(tmp_path)
    records = gpu_serving.http(path, True, gpu_serving.DRY)
    assert len(runners) == 2
    assert "Without fastapi and uvicorn there is no server here" in capsys.readouterr().out
    assert [(r["by"], r["cache"], r["errors"]) for r in records] == [
        ("engine", "hybrid", 0),
        ("engine", "none", 0),
    ]
    assert {(r["max_running"], r["token_budget"], r["cache_gib"]) for r in records} == {
        (256, 1024, 0.02)
    }


def checks_release(bench: type, runners: list[weakref.ref[ModelRunner]]) -> type:
    """Return a subclass of ``bench`` that checks that closed runners are garbage-collected."""

    class ChecksRelease(bench):
        def __init__(self, *args, **options) -> None:
            assert not any(runner() for runner in runners)
            super().__init__(*args, **options)
            runners.append(weakref.ref(self.runner))

        def close(self) -> None:
            super().close()
            assert runners[-1]() is None

    return ChecksRelease
