"""The one command for a GPU: what it keeps of each part, what it does again, and what it says where
there is none."""

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
    """Parts that are a line of Python each."""
    lines = {"kernels": "pass", "bench": "pass", "big": "raise SystemExit(3)"}
    monkeypatch.setattr(
        gpu,
        "PARTS",
        {
            word: lambda out, dry, line=line: [sys.executable, "-c", line]
            for word, line in lines.items()
        },
    )
    monkeypatch.setattr(gpu, "code_hash", lambda: "0123456789ab")
    return lines


def run(out: Path, *arguments: str) -> int:
    return gpu.main(["--dry", "--out", str(out), *arguments])


def test_a_failed_part_fails_the_whole_and_the_others_run(
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


def test_what_passed_with_this_code_is_not_done_again_what_failed_is(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path) == 1
    assert [gpu.is_done(tmp_path, part) for part in parts] == [True, True, False]
    assert not gpu.is_done(tmp_path, "parity")
    (tmp_path / "bench.jsonl").touch()
    assert run(tmp_path, "--part", "bench") == 0
    assert (tmp_path / "bench.jsonl").exists()
    assert run(tmp_path, "--part", "bench", "--again") == 0
    assert not (tmp_path / "bench.jsonl").exists()  # nothing old is taken up
    monkeypatch.setattr(gpu, "code_hash", lambda: "ba9876543210")
    assert not gpu.is_done(tmp_path, "bench")


def test_the_hash_is_of_the_code_and_not_of_git_or_results(
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


def test_results_come_home_in_one_file(parts: dict[str, str], tmp_path: Path) -> None:
    archive = tmp_path / "away" / "gpu.tar.gz"
    assert run(tmp_path / "here", "--tar", str(archive)) == 1  # a failed part's too
    with tarfile.open(archive) as found:
        assert {f"here/{part}.done.jsonl" for part in parts} < set(found.getnames())


@pytest.mark.parametrize(("interpret", "forbidden"), [("1", True), ("", False)])
def test_kernel_tests_for_a_device_are_never_interpreted(interpret: str, forbidden: bool) -> None:
    """Nor where there is no file that a driver leaves in /dev."""
    environment = dict(os.environ) | {"KERNELS_ON_DEVICE": "1", "TRITON_INTERPRET": interpret}
    code = "import tests.conftest, os; print(os.environ['TRITON_INTERPRET'])"
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=gpu.ROOT
    )
    assert ("KERNELS_ON_DEVICE forbids" in found.stderr) == forbidden
    assert forbidden or found.stdout == "\n"


def test_a_part_that_hangs_is_ended(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpu.LIMITS_S, "big", 0.3)
    monkeypatch.setitem(gpu.PARTS, "big", lambda out, dry: ["sleep", "60"])
    assert gpu.run_part("big", tmp_path, dry=True) == "timed out"


@pytest.mark.full
def test_what_a_hanging_part_started_ends_with_it(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpu.LIMITS_S, "big", 0.5)
    beacon = tmp_path / "beacon"
    shell = f"(sleep 1.5; touch {beacon}) & sleep 60"
    monkeypatch.setitem(gpu.PARTS, "big", lambda out, dry: ["sh", "-c", shell])
    assert gpu.run_part("big", tmp_path, dry=True) == "timed out"
    time.sleep(1.5)
    assert not beacon.exists()


def test_a_bare_machine_is_told_what_the_tests_need(
    parts: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert run(tmp_path) == 2
    assert "pip install pytest hypothesis" in capsys.readouterr().err
    assert run(tmp_path, "--part", "bench") == 0


def test_reports_become_records(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    assert gpu.test_records(report) == [
        {"file": "tests.a", "devices": ["a GPU"], "passed": 1, "failure": 1, "wrong": ["two"]},
        {"file": "tests.b", "devices": [], "skipped": 1, "wrong": []},
    ]


def test_without_a_gpu_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert gpu.main([]) == 2
    assert "--dry" in capsys.readouterr().err


@pytest.mark.parametrize("part", gpu.PARTS)
def test_every_part_has_a_command(part: str, tmp_path: Path) -> None:
    """Dry and in earnest they differ in one flag or in which tests they run."""
    dry, earnest = (gpu.PARTS[part](tmp_path, is_dry) for is_dry in (True, False))
    assert dry[:3] == earnest[:3]
    assert dry != earnest


def test_all_parts_together_take_25_minutes_at_most_and_each_under_8():
    assert gpu.LIMITS_S.keys() == gpu.PARTS.keys()
    assert sum(gpu.LIMITS_S.values()) <= 25 * 60 and max(gpu.LIMITS_S.values()) < 8 * 60


@pytest.mark.full
@pytest.mark.sources("kernels", "engine/runner", "engine/layers", "engine/models", "engine/weights")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="stubs the interpreter")
def test_speeds_are_taken_with_graphs_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that computes nothing: every record of the parts that need a real one."""
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
def test_steps_with_drafts_are_taken_with_a_graph_and_without(
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
def test_what_this_code_has_measured_is_kept(
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
        rank < 3 or rank >= len(first) - 3 for rank in range(len(first))
    ]


@pytest.mark.full
def test_without_the_servers_packages_the_engine_itself_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_serving.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_serving, "all_fused", str)  # interpreted, it would take long
    runners: list[weakref.ref[ModelRunner]] = []
    monkeypatch.setattr(gpu_serving, "Bench", watched(gpu_serving.Bench, runners))
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


def watched(bench: type, runners: list[weakref.ref[ModelRunner]]) -> type:
    """Of every bench, that the runner of the one before is dead when it begins, and its own when it
    is closed."""

    class Watched(bench):
        def __init__(self, *args, **options) -> None:
            assert not any(runner() for runner in runners)
            super().__init__(*args, **options)
            runners.append(weakref.ref(self.runner))

        def close(self) -> None:
            super().close()
            assert runners[-1]() is None

    return Watched
