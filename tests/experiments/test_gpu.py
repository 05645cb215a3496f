"""The one command for a GPU: what it keeps of each part, what it does again, and what it says where there is none."""

from __future__ import annotations

import os
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch

from engine.model_runner import ModelRunner
from experiments import gpu, gpu_serving
from experiments.gpu_models import TINY, write_geometry, write_tokenizer
from experiments.provenance import read_json_lines, write_json_lines
from tests.engine.numerics.stub_device import stubbed

REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="one"/><testcase classname="tests.a" name="two"><failure/></testcase>
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
    monkeypatch.setattr(gpu, "provenance", lambda: {"commit": "0123456789ab"})
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
    assert record["seconds"] < 30


def test_what_passed_on_this_commit_is_not_done_again(
    parts: dict[str, str], tmp_path: Path
) -> None:
    write_json_lines(gpu.done_file(tmp_path, "bench"), [{"verdict": "passed"}])
    file = gpu.done_file(tmp_path, "bench")
    _, rest = file.read_text().split("\n", 1)
    for commit, is_done in (
        ("0123456789ab", True),
        ("0123456789ab+", False),
        ("ba9876543210", False),
    ):
        file.write_text(f'{{"provenance": {{"commit": "{commit}"}}}}\n{rest}')
        assert gpu.is_done(tmp_path, "bench") is is_done
    file.write_text(f'{{"provenance": {{"commit": null}}}}\n{rest}')
    assert not gpu.is_done(tmp_path, "bench")
    assert not gpu.is_done(tmp_path, "kernels")


def test_a_part_that_hangs_is_ended(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpu.LIMITS_S, "big", 0.3)
    monkeypatch.setitem(gpu.PARTS, "big", lambda out, dry: ["sleep", "60"])
    assert gpu.run_part("big", tmp_path, dry=True) == "timed out"


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
        {"file": "tests.a", "passed": 1, "failure": 1, "wrong": ["two"]},
        {"file": "tests.b", "skipped": 1, "wrong": []},
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


def test_without_the_servers_packages_the_engine_itself_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_serving.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_serving.Kernels, "__slots__", ())  # interpreted, it would take long
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
    """Of every bench, that the runner of the one before is dead when it begins, and its own when it is closed."""

    class Watched(bench):
        def __init__(self, *args, **options) -> None:
            assert not any(runner() for runner in runners)
            super().__init__(*args, **options)
            runners.append(weakref.ref(self.runner))

        def close(self) -> None:
            super().close()
            assert runners[-1]() is None

    return Watched
