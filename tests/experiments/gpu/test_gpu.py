"""Tests of ``python -m experiments.gpu``: parts, their records and limits, and messages without a
GPU."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tarfile
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.gpu import __main__ as gpu
from experiments.gpu import serving as gpu_serving
from experiments.provenance import read_json_lines, resumed
from hybridcache.geometry.units import GIB
from tests.endurance.faults import is_gone
from tests.engine.device_models import TINY, write_geometry
from tests.stub_device import stubbed
from tests.waiting import wait_until


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Parts of one line of Python each."""
    lines = {"check": "pass", "bench": "pass", "big": "raise SystemExit(3)"}
    monkeypatch.setattr(gpu, "PARTS", {name: part_of(line) for name, line in lines.items()})
    monkeypatch.setattr(gpu, "code_hash", lambda: "0123456789ab")
    return lines


def part_of(line: str, limit_s: float = 60.0, files: str = "bench.jsonl", **more) -> gpu.GpuPart:
    """Return a part that runs one line of Python."""
    return gpu.GpuPart(lambda out, dry: [sys.executable, "-c", line], limit_s, files=files, **more)


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


@pytest.mark.full
def test_children_of_a_hanging_part_are_stopped(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (child := tmp_path / "child").touch()
    shell = f"sleep 600 & echo $! > {child}; sleep 600"
    monkeypatch.setitem(gpu.PARTS, "big", gpu.GpuPart(lambda out, dry: ["sh", "-c", shell], 0.5))
    assert gpu.run_part("big", tmp_path, dry=True) == "timed out"
    if pid := child.read_text():  # A slow shell is stopped before it has a child.
        wait_until(lambda: is_gone(int(pid)))


def test_a_call_ends_within_its_budget_and_the_next_one_continues(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "LEAST_S", 0.0)
    monkeypatch.setattr(gpu, "GRACE_S", 0.2)
    monkeypatch.setitem(gpu.PARTS, "big", part_of("import time; time.sleep(600)", 600.0))
    monkeypatch.setitem(gpu.PARTS, "late", part_of("pass"))

    def now_s() -> float:
        """Return a time that leaves one second to ``big`` and none to ``late``."""
        return 599.0 * gpu.is_done(tmp_path, "bench") + gpu.done_file(tmp_path, "big").exists()

    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=now_s))
    assert run(tmp_path, "--budget", "600") == 3
    _, [record] = read_json_lines(gpu.done_file(tmp_path, "big"))
    assert record["verdict"] == "stopped"
    assert [gpu.is_done(tmp_path, part) for part in ("check", "bench", "late")] == [
        True,
        True,
        False,
    ]
    monkeypatch.setitem(gpu.PARTS, "big", part_of("pass"))
    monkeypatch.setattr(gpu, "time", time)
    assert run(tmp_path, "--budget", "600") == 0
    assert gpu.is_done(tmp_path, "late")


def test_a_signal_leaves_an_archive_of_the_finished_records(tmp_path, monkeypatch) -> None:
    """The parts write a record, and then wait for the signal."""
    out = tmp_path / "out"
    line = f"import pathlib, time; pathlib.Path({str(out)!r}, 'one.jsonl').touch(); time.sleep(600)"
    monkeypatch.setattr(gpu, "PARTS", {"check": part_of(line, 600)})
    arguments = ["--dry", "--part", "check", "--out", str(out)]
    process = multiprocessing.get_context("fork").Process(target=gpu.main, args=(arguments,))
    process.start()
    wait_until((out / "one.jsonl").exists)
    process.terminate()
    process.join(120)
    assert process.exitcode == 128 + signal.SIGTERM
    with tarfile.open(tmp_path / "out.tar.gz") as found:
        assert {"out/one.jsonl", "out/check.done.jsonl"} < set(found.getnames())


def test_a_finished_work_holds_no_memory_while_the_next_begins(tmp_path: Path) -> None:
    def jobs():
        for name in "ab":
            held = set()
            alive = weakref.ref(held)
            yield name, lambda held=held: {"size": len(held)}
            del held
            assert alive() is None

    assert len(list(resumed(tmp_path / "one.jsonl", {}, jobs()))) == 2


@pytest.mark.full
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="stubs the interpreter")
def test_speeds_are_measured_with_and_without_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stub device, which computes nothing, gives all records of the parts that need a GPU."""
    pytest.importorskip("triton")
    path = write_geometry(tmp_path, TINY)
    with stubbed(monkeypatch):
        records = [work() for _, work in gpu_serving.measure(path, False, gpu_serving.DRY)]
    start, *measured = records
    assert "graphs" in start["warm_up"] and start["warm_up_bytes"] > 0
    assert (start["token_budget"], start["max_running"]) == (8192, 64)
    decoding = next(record for record in measured if record["measure"] == "decoding")
    assert decoding["decode_steps"] > 0 and decoding["decode_step_ms_median"] > 0
    speeds = [(r["measure"], r["graphs"]) for r in measured if "graphs" in r]
    measures = ("decoding", "prefix hit")
    assert speeds == [(m, graphs) for graphs in ("all", "decode", "off") for m in measures]
    fast, exact = (measured[-1][mode] for mode in ("without", "exact"))
    assert fast["token_hit_rate"] > exact["token_hit_rate"] and measured[-1]["ttft_ratios"]


def test_a_model_too_large_for_the_device_is_skipped(monkeypatch, tmp_path, capsys) -> None:
    device = SimpleNamespace(free_bytes=lambda: 39 * GIB, supports=lambda format: True)
    monkeypatch.setattr(gpu_serving, "Device", SimpleNamespace(resolve=lambda name: device))
    monkeypatch.setattr(sys, "argv", ["serving", "--part", "big", "--out", str(tmp_path)])
    assert gpu_serving.main() == 0
    assert "needs 56 GiB; 39 GiB are free" in capsys.readouterr().err


def test_a_large_model_is_measured_in_the_formats_that_fit() -> None:
    """An H100 has 79 GiB, an H200 139."""
    four, fp8 = {"quantization": "int4-128"}, {"quantization": "fp8"}
    assert gpu_serving.formats_for(79 * GIB, has_fp8=True) == [four]
    found = gpu_serving.formats_for(139 * GIB, has_fp8=True)
    assert found == [fp8 | {"fp8_activations": True}, fp8, four]
    found = gpu_serving.formats_for(139 * GIB, has_fp8=False)
    assert found == [{"quantization": "int8"}, four]


def test_the_first_call_begins_all_parts_that_say_the_most() -> None:
    first = ["check", "repeat", "parity", "big", "tune", "http"]
    assert list(gpu.PARTS)[: len(first)] == first
    assert sum(gpu.PARTS[part].limit_s for part in first) <= 560
