"""The choice of tests for `make test`, `make test-changed` and `make test-all`."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import mutation, run, selection

ROOT = selection.ROOT


def item(nodeid: str, ids: list[str] | None = None, **marks: tuple[Any, ...]) -> Any:
    """Return what the selection looks at of a collected test."""
    name, _, case = nodeid.partition("[")
    made = SimpleNamespace(
        nodeid=nodeid,
        path=ROOT / name.partition("::")[0],
        get_closest_marker=lambda word: (
            SimpleNamespace(args=marks[word], kwargs={}) if word in marks else None
        ),
    )
    if case:
        values = ids or case[:-1].split("-")
        made.callspec = SimpleNamespace(
            _idlist=values, id=case[:-1], params=dict(enumerate(values))
        )
    return made


def chosen(*items: Any, known: dict[str, str] | None = None) -> list[str]:
    kept = selection.Selection(known or {}).choose([_hashable(one) for one in items])
    return [one.nodeid.partition("::")[2] for one in kept]


class _Item(SimpleNamespace):
    __hash__ = object.__hash__  # type: ignore[assignment]


def _hashable(one: Any) -> Any:
    return _Item(**vars(one))


def test_its_examples_run() -> None:
    assert not doctest.testmod(selection).failed


def test_of_a_product_each_value_runs_once() -> None:
    cases = [item(f"tests/lab/x.py::a[{a}-{b}]") for a in "xyz" for b in "12"]
    assert chosen(*cases, item("tests/lab/x.py::b")) == ["a[x-1]", "a[y-2]", "a[z-1]", "b"]


def test_what_is_marked_full_is_left_out_but_for_the_named_cases() -> None:
    cases = [item(f"tests/lab/x.py::a[{n}]", full=("2", "3")) for n in range(5)]
    assert chosen(*cases, item("tests/lab/x.py::b", full=())) == ["a[2]", "a[3]"]


def test_a_mark_that_names_no_case_is_refused() -> None:
    cases = [item(f"tests/lab/x.py::a[{n}]", full=("2", "9")) for n in range(5)]
    with pytest.raises(pytest.UsageError, match="has no case with the id '9'"):
        chosen(*cases)


def test_families_are_a_few_representatives() -> None:
    families = sorted(selection.family_names())
    assert set(selection.REPRESENTATIVES) < set(families)
    numerics = [item(f"tests/engine/numerics/x.py::a[{name}]") for name in families]
    expected = {f"a[{name}]" for name in selection.REPRESENTATIVES}
    assert set(chosen(*numerics)) == expected
    elsewhere = [item(f"tests/lab/x.py::a[{name}]") for name in families]
    assert len(chosen(*elsewhere)) == len(families)


def test_a_family_whose_own_files_changed_runs_too() -> None:
    known = {f"family {name}": selection.family_hash(name) for name in selection.family_names()}
    cases = [item(f"tests/engine/numerics/x.py::a[{name}]") for name in selection.family_names()]
    assert len(chosen(*cases, known=known)) == len(selection.REPRESENTATIVES)
    known["family kimi_linear"] = "another"
    assert "a[kimi_linear]" in chosen(*cases, known=known)


def test_a_family_needs_its_layers_and_what_all_share_counts_for_none() -> None:
    shared = set().union(*map(selection._family_files, selection.REPRESENTATIVES))
    own = {file.stem for file in selection._family_files("kimi_linear") - shared}
    assert {"kimi_linear", "kda", "mla"} <= own and "decoder" not in own


def test_a_change_selects_the_tests_that_import_it() -> None:
    some = ("test_house.py", "cache/test_room.py", "engine/server/test_page.py")
    some += ("kernels/test_gdn.py", "lab/test_page.py")
    tests = [ROOT / "tests" / name for name in some]

    def names(*changed: str) -> set[str]:
        found = run.affected(changed, tests)
        return {test.relative_to(ROOT / "tests").as_posix() for test in found}

    assert names("tests/conftest.py") == set(some)
    assert names("hybridcache/radix/tree.py") == set(some) - {"kernels/test_gdn.py"}
    assert names("engine/server/app.py") == {"test_house.py", "engine/server/test_page.py"}
    assert names("kernels/gdn/native.cpp") >= {"test_house.py", "kernels/test_gdn.py"}
    assert names("hybridcache/lab/README.md") == {"test_house.py", "lab/test_page.py"}
    assert names("tests/cache/serving.py") == {"test_house.py", "cache/test_room.py"}


def test_tests_of_changed_sources_run_whole_until_they_pass(tree: Path) -> None:
    cases = [item(f"tests/kernels/test_a.py::a[{a}-{b}]") for a in "xy" for b in "12"]
    first = selection.Selection({})
    assert len(first.choose([_hashable(one) for one in cases])) == 2, "a clean clone"
    assert len(chosen(*cases, known=first.hashes)) == 2, "nothing changed"
    (tree / "kernels/one/native.cpp").write_text("2")
    forget()
    assert len(chosen(*cases, known=first.hashes)) == 4
    (tree / "kernels/one/native.cpp").write_text("1")
    (tree / "kernels/other/fused.py").write_text("x = 2")
    forget()
    assert len(chosen(*cases, known=first.hashes)) == 2, "another kernel"


def forget() -> None:
    """As a process that begins."""
    for remembered in vars(selection).values():
        if hasattr(remembered, "cache_clear"):
            remembered.cache_clear()


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small repository."""
    files = {
        "kernels/__init__.py": "",
        "kernels/one/__init__.py": "",
        "kernels/one/reference.py": "",
        "kernels/one/native.cpp": "1",
        "kernels/other/__init__.py": "",
        "kernels/other/fused.py": "x = 1",
        "engine/__init__.py": "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from engine.heavy import Heavy\n",
        "engine/heavy.py": "Heavy = 1",
        "engine/light.py": "from engine.__init__ import missing",
        "engine/plugins/__init__.py": "import pkgutil\nlist(pkgutil.iter_modules(__path__))",
        "engine/plugins/one.py": "",
        "tests/kernels/test_a.py": "from kernels.one import reference",
        "tests/test_light.py": "import engine.light",
        "tests/test_heavy.py": "from engine import Heavy",
        "tests/test_plugins.py": "import engine.plugins",
        "tests/part/test_command.py": "command = ['python', '-m', 'engine.heavy']",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for module in (selection, run):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    forget()
    yield tmp_path
    forget()


@pytest.mark.parametrize(
    ("test", "needs", "needs_not"),
    [
        ("test_light.py", "engine/light.py", "engine/heavy.py"),
        ("test_light.py", "engine/__init__.py", "engine/plugins/one.py"),
        ("test_heavy.py", "engine/heavy.py", "engine/light.py"),
        ("test_plugins.py", "engine/plugins/one.py", "engine/light.py"),
        ("part/test_command.py", "engine/heavy.py", "engine/light.py"),
    ],
)
def test_imports_are_followed(tree: Path, test: str, needs: str, needs_not: str) -> None:
    """Imports for type checkers are none; a name that a package offers lazily, a package that is
    searched and a command's module are."""
    found = selection.closure(tree / "tests" / test)
    assert tree / needs in found and tree / needs_not not in found


def test_every_test_file_is_in_one_part() -> None:
    parts = [file for files in run.test_parts().values() for file in files]
    assert sorted(parts) == sorted((ROOT / "tests").rglob("test_*.py"))
    named = [part.name for part in run.all_parts()]
    assert len(named) == len(set(named)) and {"system: soak", "mutation"} <= set(named)


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


def test_processes_report_all_and_one_that_dies_is_replaced(tmp_path: Path) -> None:
    for name, text in (("test_a.py", SUITE), ("test_b.py", SUITE), ("test_c.py", DIES)):
        (tmp_path / name).write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]")
    own = ("-p", "tests.forked", "-p", "no:cacheprovider", "-p", "no:hypothesispytest")
    command = [sys.executable, "-m", "pytest", *own, "--processes", "2"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
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


def test_parts_are_run_and_failures_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "ROOT", tmp_path)
    parts = [
        run.Part("good", ["echo", "3 passed in 0.1s"], cwd=tmp_path),
        run.Part("bad", ["sh", "-c", "echo why; exit 3"], cwd=tmp_path),
        run.Part("absent", (), missing="no such thing"),
    ]
    assert run.run(parts, tmp_path / "out") == 1
    shown = capsys.readouterr().out
    assert "3 passed in 0.1s" in shown and "FAILED (3)" in shown and "    why" in shown
    assert "not run: no such thing" in shown and "2 of 3 ran, failed: bad." in shown
    assert run.run(parts[:1], tmp_path / "out") == 0
    assert "all passed" in capsys.readouterr().out


def test_marks_name_folders_that_exist() -> None:
    """A folder that moved would silence a mark."""
    for folders in selection.SOURCES.values():
        assert all((ROOT / folder).is_dir() for folder in folders)
    named = [*selection.SOURCES, *selection.TOGETHER, *selection.FAMILY_FOLDERS]
    assert [folder for folder in named if not (ROOT / folder).is_dir()] == []


def test_a_wrong_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDCACHE_TESTS", "most")
    with pytest.raises(pytest.UsageError, match="must be quick or all"):
        selection.level()
    monkeypatch.setenv("HYBRIDCACHE_TESTS", "all")
    assert selection.num_examples(40) == 40
    monkeypatch.setenv("HYBRIDCACHE_TESTS", "quick")
    assert selection.num_examples(40) == 40 // selection.QUICK_SHARE


def test_what_is_mutated_and_the_tests_that_must_notice_exist() -> None:
    for group in mutation.GROUPS.values():
        assert all(any(ROOT.glob(pattern)) for pattern in group.mutated), group.mutated
        assert "hybridcache/radix/check.py" not in mutation.files_of(group)
        assert all((ROOT / test).exists() for test in group.tests), group.tests
