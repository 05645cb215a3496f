"""Tests of the selection for `make test` and `make test-all`, and of the seeds of tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import mutation, run, selection

ROOT = selection.ROOT


def test_each_test_file_is_in_one_part() -> None:
    parts = [file for files in run.test_parts().values() for file in files]
    assert sorted(parts) == sorted((ROOT / "tests").rglob("test_*.py"))
    named = [part.name for part in run.all_parts()]
    assert len(named) == len(set(named)) and {"endurance: soak"} <= set(named)


def test_a_part_that_passed_is_not_run_again_on_the_same_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "ROOT", tmp_path)
    parts = [run.Part(name, [name], cwd=tmp_path) for name in ("true", "false")]
    for of, is_left_out in (("", False), ("a", False), ("a", True), ("b", False), ("", False)):
        assert run.run(parts, tmp_path / "out", of) == 1
        lines = capsys.readouterr().out.splitlines()
        assert ("passed before on this commit" in lines[0]) == is_left_out
        assert "FAILED" in lines[1]


SUITE = """
import os, warnings
import pytest

def note(name):
    with open(name, "a") as file:
        file.write("x")

@pytest.fixture(scope="module")
def built(request):
    note("built")
    yield
    note("torn down")

@pytest.mark.parametrize("number", range(3))
def test_one(number, built, tmp_path, capfd):
    os.write(1, b"shown")
    assert capfd.readouterr().out == "shown"
    assert number != 1, "one is wrong"
    (tmp_path / "file").touch(exist_ok=False)
    warnings.warn("look here")
"""
DIES = """
import os
def test_before(): pass
def test_dies(): os._exit(7)
def test_after(): pass
"""


def test_forked_processes_report_all_and_are_replaced_if_they_die(tmp_path: Path) -> None:
    for name, text in (("test_a.py", SUITE), ("test_b.py", SUITE), ("test_c.py", DIES)):
        (tmp_path / name).write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]")
    own = ("-p", "tests.forked", "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", *own, "--processes", "2"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "3 failed, 6 passed, 4 warnings" in done.stdout
    assert "The process of this test ended with exit code 7." in done.stdout
    assert done.stdout.count("one is wrong") >= 2 and "look here" in done.stdout
    for name in ("built", "torn down"):
        assert (tmp_path / name).read_text() == "xx"
    stopped = subprocess.run(
        [*command, "-x", "test_a.py"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert stopped.returncode == 1 and "stopping after 1 failures" in stopped.stdout


def test_rooms_of_mutants_name_files_and_tests() -> None:
    """A renamed file would leave its room without a message."""
    rooms = mutation.rooms()
    assert {"hybridcache/vllm", "hybridcache/sglang", "engine/front/server"} <= rooms.keys()
    assert {*mutation.TESTS, *mutation.ALL_CASES} <= {*rooms, "engine/plugins"}
    for name, tests in [
        *mutation.TESTS.items(),
        *((name, " ".join(one.tests)) for name, one in rooms.items()),
    ]:
        for path in tests.split():
            assert (ROOT / "tests" / path.partition("::")[0]).exists(), (name, path)


def test_a_copy_for_mutants_loses_files_that_the_repository_lost(tmp_path: Path) -> None:
    olds = [tmp_path / "hybridcache/old.py", tmp_path / "mutants/engine/old.py"]
    for old in olds:
        old.parent.mkdir(parents=True)
        old.write_text("")
    assert mutation.prepare([], [], tmp_path) and not any(old.exists() for old in olds)
    assert not mutation.prepare([], [], tmp_path)
    assert (tmp_path / "hybridcache/config.py").exists()


def test_a_sample_of_a_seed_is_always_the_same() -> None:
    files = [file for room in mutation.rooms().values() for file in room.files]
    drawn = mutation.draw(files, 200, 9)
    assert drawn == mutation.draw(files, 200, 9) and set(drawn) <= set(files)
    assert sum(map(len, drawn.values())) == 200


def test_excluded_tests_and_equivalent_mutants_exist() -> None:
    """A renamed test or a changed line would make an entry void without a message."""
    files = list((ROOT / "tests").rglob("test_*.py"))
    for name in mutation.EXCLUDED:
        assert any(name in file.stem or name in file.read_text() for file in files), name
    for mutant in mutation.listed(mutation.EQUIVALENT.read_text()):
        module = mutant.function.split(".")
        paths = [ROOT.joinpath(*module[:end]).with_suffix(".py") for end in range(len(module))]
        [source] = [path.read_text() for path in paths if path.is_file()]
        lines = {line.strip() for line in source.splitlines()}
        assert {line[2:] for line in mutant.changes if line[0] == "-"} <= lines, str(mutant)


@pytest.mark.parametrize("_", range(2))
def test_a_test_and_each_example_begin_with_the_same_numbers_of_torch(_: int) -> None:
    first = torch.rand(4, generator=torch.Generator().manual_seed(0))
    found = [torch.rand(4)]

    @settings(max_examples=3, database=None)
    @given(st.integers())
    def draw(_: int) -> None:
        found.append(torch.rand(4))

    draw()
    assert len(found) > 2 and all(torch.equal(one, first) for one in found)
