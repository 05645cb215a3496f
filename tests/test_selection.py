"""Tests of the selection for `make test`, `make test-changed` and `make test-all`."""

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
    """Return a fake pytest item with the attributes that the selection reads."""
    name, _, case = nodeid.partition("[")
    made = SimpleNamespace(
        nodeid=nodeid,
        path=ROOT / name.partition("::")[0],
        get_closest_marker=lambda mark: (
            SimpleNamespace(args=marks[mark], kwargs={}) if mark in marks else None
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


def test_doctests_pass() -> None:
    assert not doctest.testmod(selection).failed


def test_each_value_of_several_parameters_runs_once() -> None:
    cases = [item(f"tests/lab/x.py::a[{a}-{b}]") for a in "xyz" for b in "12"]
    assert chosen(*cases, item("tests/lab/x.py::b")) == ["a[x-1]", "a[y-2]", "a[z-1]", "b"]


def test_only_the_named_cases_of_a_full_mark_run() -> None:
    cases = [item(f"tests/lab/x.py::a[{n}]", full=("2", "3")) for n in range(5)]
    assert chosen(*cases, item("tests/lab/x.py::b", full=())) == ["a[2]", "a[3]"]


def test_full_mark_with_unknown_case_is_rejected() -> None:
    cases = [item(f"tests/lab/x.py::a[{n}]", full=("2", "9")) for n in range(5)]
    with pytest.raises(pytest.UsageError, match="has no case with the id '9'"):
        chosen(*cases)


def test_only_representative_families_run() -> None:
    families = sorted(selection.family_names())
    assert set(selection.REPRESENTATIVES) < set(families)
    numerics = [item(f"tests/engine/numerics/x.py::a[{name}]") for name in families]
    expected = {f"a[{name}]" for name in selection.REPRESENTATIVES}
    assert set(chosen(*numerics)) == expected
    elsewhere = [item(f"tests/lab/x.py::a[{name}]") for name in families]
    assert len(chosen(*elsewhere)) == len(families)


def test_family_with_changed_files_runs_too() -> None:
    known = {f"family {name}": selection.family_hash(name) for name in selection.family_names()}
    cases = [item(f"tests/engine/numerics/x.py::a[{name}]") for name in selection.family_names()]
    assert len(chosen(*cases, known=known)) == len(selection.REPRESENTATIVES)
    known["family kimi_linear"] = "another"
    assert "a[kimi_linear]" in chosen(*cases, known=known)


def test_family_files_include_its_layers_but_not_shared_modules() -> None:
    shared = set().union(*map(selection._family_files, selection.REPRESENTATIVES))
    own = {file.stem for file in selection._family_files("kimi_linear") - shared}
    assert {"kimi_linear", "kda", "mla"} <= own and "decoder" not in own


def test_change_selects_the_tests_that_import_it() -> None:
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


def test_all_cases_run_after_a_change_of_their_sources(tree: Path) -> None:
    cases = [item(f"tests/kernels/test_a.py::a[{a}-{b}]") for a in "xy" for b in "12"]
    first = selection.Selection({})
    assert len(first.choose([_hashable(one) for one in cases])) == 2, "a clean clone"
    assert len(chosen(*cases, known=first.hashes)) == 2, "nothing changed"
    (tree / "kernels/one/native.cpp").write_text("2")
    clear_caches()
    assert len(chosen(*cases, known=first.hashes)) == 4
    (tree / "kernels/one/native.cpp").write_text("1")
    (tree / "kernels/other/fused.py").write_text("x = 2")
    clear_caches()
    assert len(chosen(*cases, known=first.hashes)) == 2, "another kernel"


def clear_caches() -> None:
    """Clear all function caches of the module, as in a new process."""
    for function in vars(selection).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Small repository."""
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
    clear_caches()
    yield tmp_path
    clear_caches()


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
def test_closure_follows_imports(tree: Path, test: str, needs: str, needs_not: str) -> None:
    """Lazy attributes of a package, searched packages and modules of commands count as imports;
    imports under TYPE_CHECKING do not."""
    found = selection.closure(tree / "tests" / test)
    assert tree / needs in found and tree / needs_not not in found


def test_each_test_file_is_in_one_part() -> None:
    parts = [file for files in run.test_parts().values() for file in files]
    assert sorted(parts) == sorted((ROOT / "tests").rglob("test_*.py"))
    named = [part.name for part in run.all_parts()]
    assert len(named) == len(set(named)) and {"endurance: soak", "mutation"} <= set(named)


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


def test_run_executes_parts_and_prints_failures(
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


def test_selection_tables_name_existing_folders() -> None:
    """A moved folder would disable its entry."""
    for folders in selection.SOURCES.values():
        assert all((ROOT / folder).is_dir() for folder in folders)
    named = [*selection.SOURCES, *selection.TOGETHER, *selection.FAMILY_FOLDERS]
    assert [folder for folder in named if not (ROOT / folder).is_dir()] == []


def test_unknown_level_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDCACHE_TESTS", "most")
    with pytest.raises(pytest.UsageError, match="must be quick or all"):
        selection.level()
    monkeypatch.setenv("HYBRIDCACHE_TESTS", "all")
    assert selection.num_examples(40) == 40
    monkeypatch.setenv("HYBRIDCACHE_TESTS", "quick")
    assert selection.num_examples(40) == 40 // selection.QUICK_SHARE


def test_excluded_tests_and_equivalent_mutants_exist() -> None:
    """A renamed test or a changed line would make an entry void without a message."""
    files = list((ROOT / "tests").rglob("test_*.py"))
    for name in mutation.SLOW:
        assert any(name in file.stem or name in file.read_text() for file in files), name
    for mutant in mutation.listed(mutation.EQUIVALENT.read_text()):
        module = mutant.function.split(".")
        paths = [ROOT.joinpath(*module[:end]).with_suffix(".py") for end in range(len(module))]
        [source] = [path.read_text() for path in paths if path.is_file()]
        lines = {line.strip() for line in source.splitlines()}
        assert {line[2:] for line in mutant.changes if line[0] == "-"} <= lines, str(mutant)


def test_mutation_groups_name_existing_files() -> None:
    for group in mutation.GROUPS.values():
        assert all(any(ROOT.glob(pattern)) for pattern in group.mutated), group.mutated
        assert "hybridcache/radix/check.py" not in mutation.files_of(group)
        assert all((ROOT / test).exists() for test in group.tests), group.tests
