"""Tests of ``python -m experiments.gpu``: parts, their records and limits, and messages without a
GPU."""

from __future__ import annotations

import json
import os
import signal
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
from experiments.gpu.stub_device import stubbed
from experiments.provenance import read_json_lines, write_json_lines


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Parts of one line of Python each."""
    lines = {"check": "pass", "bench": "pass", "big": "raise SystemExit(3)"}
    monkeypatch.setattr(gpu, "PARTS", {name: part_of(line) for name, line in lines.items()})
    monkeypatch.setattr(gpu, "code_hash", lambda: "0123456789ab")
    return lines


def part_of(line: str, limit_s: float = 60.0, files: str = "bench.jsonl", **more) -> gpu.Part:
    """Return a part that runs one line of Python."""
    return gpu.Part(lambda out, dry: [sys.executable, "-c", line], limit_s, files=files, **more)


def run(out: Path, *arguments: str) -> int:
    return gpu.main(["--dry", "--out", str(out), *arguments])


def test_failed_part_fails_the_run_but_others_still_run(
    parts: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path) == 1
    assert (
        capfd.readouterr().out.splitlines()[-1].endswith(": check passed, bench passed, big failed")
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
    monkeypatch.setitem(gpu.PARTS, "big", part_of("import time; time.sleep(60)", 0.3))
    assert gpu.run_part("big", tmp_path, dry=True) == "timed out"


@pytest.mark.full
def test_children_of_a_hanging_part_are_stopped(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beacon = tmp_path / "beacon"
    shell = f"(sleep 1.5; touch {beacon}) & sleep 60"
    monkeypatch.setitem(gpu.PARTS, "big", gpu.Part(lambda out, dry: ["sh", "-c", shell], 0.5))
    assert gpu.run_part("big", tmp_path, dry=True) == "timed out"
    time.sleep(1.5)
    assert not beacon.exists()


def test_a_call_ends_within_its_budget_and_the_next_one_continues(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "LEAST_S", 0.0)
    monkeypatch.setattr(gpu, "GRACE_S", 0.2)
    monkeypatch.setitem(gpu.PARTS, "big", part_of("import time; time.sleep(60)"))
    monkeypatch.setitem(gpu.PARTS, "late", part_of("pass"))
    begin = time.monotonic()
    assert run(tmp_path, "--budget", "4") == 3
    assert time.monotonic() - begin < 30
    _, [record] = read_json_lines(gpu.done_file(tmp_path, "big"))
    assert record["verdict"] == "stopped"
    assert [gpu.is_done(tmp_path, part) for part in ("check", "bench", "late")] == [
        True,
        True,
        False,
    ]
    monkeypatch.setitem(gpu.PARTS, "big", part_of("pass"))
    assert run(tmp_path, "--budget", "60") == 0
    assert gpu.is_done(tmp_path, "late")


def test_a_signal_leaves_an_archive_of_the_finished_records(tmp_path: Path) -> None:
    """The parts write a record, and then wait for the signal."""
    out = tmp_path / "out"
    line = f"import pathlib, time; pathlib.Path({str(out)!r}, 'one.jsonl').touch(); time.sleep(60)"
    script = (
        "import sys\nfrom experiments.gpu import __main__ as gpu\n"
        f"gpu.PARTS = {{'check': gpu.Part(lambda out, dry: [sys.executable, '-c', {line!r}], 60)}}\n"
        f"gpu.main(['--dry', '--part', 'check', '--out', {str(out)!r}])"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=gpu.ROOT) as process:
        while not (out / "one.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    with tarfile.open(tmp_path / "out.tar.gz") as found:
        assert {"out/one.jsonl", "out/check.done.jsonl"} < set(found.getnames())


def test_a_part_without_its_packages_is_skipped_alone(
    parts: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(gpu.PARTS, "big", part_of("pass", needs=("json", "no_such_package")))
    assert run(tmp_path) == 0
    assert "Skipped: big needs no_such_package." in capsys.readouterr().err
    assert [gpu.is_done(tmp_path, part) for part in parts] == [True, True, False]


def test_a_dry_run_needs_no_assembler(parts: dict[str, str], tmp_path: Path) -> None:
    gpu.PARTS["big"] = part_of("raise SystemExit(1)", bundled=True)
    assert run(tmp_path) == 0


def test_cases_with_other_bits_are_named(tmp_path: Path) -> None:
    for folder, digests in (("", "ab"), ("bundled", "ac")):
        records = [{"case": str(i), "digest": d} for i, d in enumerate(digests)]
        write_json_lines(tmp_path / folder / "check_kernels_norm.jsonl", records)
    assert gpu.other_bits(tmp_path) == ["1"]


@pytest.mark.full
def test_passed_tests_are_not_repeated(tmp_path: Path) -> None:
    test = tmp_path / "test_two.py"
    test.write_text("def test_a(): pass\ndef test_b(): assert not __file__\n")
    records = tmp_path / "tests.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "experiments.gpu.recorded_tests"]
    command += ["--records", str(records), "--rootdir", str(tmp_path), str(test)]
    environment = dict(os.environ) | {"PYTHONPATH": str(gpu.ROOT)}
    first = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert "1 failed, 1 passed" in first.stdout, first.stdout + first.stderr
    again = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert "1 failed, 1 deselected" in again.stdout
    found = [json.loads(line) for line in records.read_text().splitlines()]
    assert [(r["test"].split("::")[1], r["outcome"]) for r in found] == [
        ("test_a", "passed"),
        ("test_b", "failed"),
        ("test_b", "failed"),
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
    dry, real = (gpu.PARTS[part].command(tmp_path, is_dry) for is_dry in (True, False))
    assert dry[:3] == real[:3]
    assert dry != real


def test_every_part_fits_a_call_of_ten_minutes() -> None:
    assert max(part.limit_s for part in gpu.PARTS.values()) <= 500
    first = ["check", "repeat", "parity"]
    assert list(gpu.PARTS)[:3] == first
    assert sum(gpu.PARTS[part].limit_s for part in first) <= 560


@pytest.mark.full
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
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="stubs the interpreter")
def test_draft_steps_are_measured_with_and_without_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    path, scale = write_geometry(tmp_path, TINY), replace(gpu_serving.DRY, streams=(1, 2, 8))
    with stubbed(monkeypatch):
        records = list(gpu_serving.drafted(path, False, scale))
        assert list(gpu_serving.drafted(path, False, scale, records)) == records
    assert [(r["graphs"], r["streams"]) for r in records] == [
        (graphs, streams) for graphs in ("all", "pieces", "off") for streams in (1, 2, 4)
    ]


@pytest.mark.full
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
    assert "Measured without HTTP, which needs starlette and uvicorn." in capsys.readouterr().out
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
