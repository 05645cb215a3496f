"""Choose what `make test` runs: a representative part of the suite, the rest in `make test-all`.

The level is "quick" unless the environment variable HYBRIDCACHE_TESTS is "all". At level "quick"

- tests marked ``full`` are left out, but for the cases that the mark names;
- of a test with several parameters each value of each runs once, not every combination;
- of the model families only REPRESENTATIVES run, and those that a changed file belongs to;
- hypothesis draws fewer examples.

A test marked ``sources`` depends on certain folders alone. All of its cases run once those have
changed since the last green run; the cache of pytest remembers a hash for each. A clone without
that cache counts as unchanged. Cases that are named on the command line (``file::test``) always
run.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("hybridcache", "engine", "kernels", "experiments", "tests")
REPRESENTATIVES = ("qwen3_next", "granite_moe_hybrid", "qwen3")
"""Model families of `make test`: Gated DeltaNet with experts, Mamba-2, attention alone."""
SOURCES = {"tests/kernels/": ("kernels",)}
"""Folders whose tests are all marked ``sources``, and what these depend on."""
TOGETHER = ("tests/engine/numerics/", "tests/engine/server/")
"""Folders whose tests share expensive session fixtures, so that one worker runs them all."""
QUICK_SHARE = 4
"""Level "quick" draws one in so many of the examples that a test asks for."""


def level() -> str:
    """Return "quick" or "all"."""
    asked = os.environ.get("HYBRIDCACHE_TESTS", "quick")
    if asked not in ("quick", "all"):
        raise pytest.UsageError(f"HYBRIDCACHE_TESTS must be quick or all (got {asked!r}).")
    return "all" if os.environ.get("KERNELS_ON_DEVICE") == "1" else asked


def is_quick() -> bool:
    return level() == "quick"


def num_examples(asked: int) -> int:
    """Return how many of ``asked`` hypothesis examples this level draws."""
    return asked if level() == "all" else max(2, asked // QUICK_SHARE)


# --- Imports ------------------------------------------------------------------------------------


def _module_file(name: str) -> Path | None:
    """Return the file of a dotted module of this repository."""
    if name.split(".")[0] not in PACKAGES:
        return None
    path = ROOT.joinpath(*name.split("."))
    candidates = (path / "__init__.py", path.with_suffix(".py"))
    return next((file for file in candidates if file.is_file()), None)


def _name_of(file: Path) -> str:
    """Return the dotted name of a module's file."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


class _Names(ast.NodeVisitor):
    """Collector of the modules that a file names; imports for type checkers do not count."""

    def __init__(self, path: Path) -> None:
        self.modules: set[str] = set()
        self.searched: set[str] = set()
        """Packages of which all modules may be imported."""
        self.bound: dict[str, str] = {}
        """Imports for type checkers: name -> module that defines it."""
        self.files: set[Path] = set()
        self._package = path.relative_to(ROOT).parent.parts
        # Not those of the suite's own machinery, which is directly in tests/ and names everything.
        is_part = path.parent != ROOT / "tests"
        self._reads_strings = is_part and self._package[0] in ("tests", "experiments")
        self._typing = 0

    def visit_If(self, node: ast.If) -> None:
        is_typing = ast.unparse(node.test).endswith("TYPE_CHECKING")
        self._typing += is_typing
        for child in node.body:
            self.visit(child)
        self._typing -= is_typing
        for child in node.orelse:
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        if not self._typing:
            self.modules.update(alias.name for alias in node.names)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        parts = self._package
        base = parts[: len(parts) - node.level + 1] if node.level else ()
        module = ".".join((*base, *filter(None, (node.module or "").split("."))))
        if module == "pkgutil":
            self.searched.add(".".join(parts))
        for alias in node.names:
            self.bound[alias.asname or alias.name] = module
            if not self._typing:
                self.modules.add(f"{module}.{alias.name}")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in ("iter_modules", "walk_packages"):
            self.searched.add(".".join(self._package))
        if isinstance(node.value, ast.Name) and node.value.id in PACKAGES:
            self.modules.add(f"{node.value.id}.{node.attr}")
        self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        first = node.values[0] if node.values else None
        if isinstance(first, ast.Constant) and str(first.value).endswith("."):
            self.searched.add(str(first.value)[:-1])
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if not self._reads_strings or not isinstance(node.value, str):
            return
        if node.value in PACKAGES:  # a command
            self.modules.add(f"{node.value}.__main__")
        elif DOTTED.fullmatch(node.value):
            self.modules.add(node.value)
        elif len(node.value) > 20:  # code for another process
            self.modules.update(DOTTED.findall(node.value))
        self.files.update(ROOT / found for found in PATH.findall(node.value))


DOTTED = re.compile(r"\b(?:{})(?:\.\w+)+".format("|".join(PACKAGES)))
PATH = re.compile(r"(?:{})(?:/[\w.]+)+".format("|".join(PACKAGES)))


@cache
def _names_in(path: Path) -> _Names:
    names = _Names(path)
    names.visit(ast.parse(path.read_text(encoding="utf-8")))
    return names


def modules_in(path: Path) -> set[str]:
    """Return the dotted names that a Python file imports, lazily or not, but for type checkers."""
    return _names_in(path).modules


def _files_of(name: str, seen: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield the file that a dotted name leads to, and that of each package around it.

    What a package offers lazily (``hybridcache.simulate``) leads to the module that defines it.
    """
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        file = _module_file(".".join(parts[:count]))
        if file is None:
            continue
        yield file
        for folder in file.relative_to(ROOT).parents:
            if (init := ROOT / folder / "__init__.py").is_file():
                yield init
        if count < len(parts) and file.name == "__init__.py" and name not in seen:
            defined = _names_in(file).bound.get(parts[count])
            if defined is not None:
                yield from _files_of(f"{defined}.{parts[count]}", seen | {name})
        return


@cache
def imports(path: Path, discovered: bool = True) -> frozenset[Path]:
    """Return the repository's files that a Python file imports, lazily or not.

    In tests and experiments strings count too, because they start modules (``-m engine``) and patch
    attributes by name. ``discovered``: with all modules below a package that is searched
    (``iter_modules``) or imported by a computed name (``f"kernels.{word}.native"``).
    """
    names = _names_in(path)
    modules, files = set(names.modules), set(names.files)
    for package in names.searched if discovered else ():
        if _module_file(package) is not None:
            folder = ROOT.joinpath(*package.split("."))
            modules.update(map(_name_of, folder.rglob("*.py")))
    for name in modules:
        files.update(_files_of(name))
    return frozenset(file for file in files if file.is_file() and file != path)


def _fixtures_of(file: Path) -> Iterator[Path]:
    """Yield the ``conftest.py`` of every folder that a test lies in."""
    for folder in file.relative_to(ROOT).parents:
        if (conftest := ROOT / folder / "conftest.py").is_file():
            yield conftest


def closure(start: Path, within: Collection[str] = PACKAGES, discovered: bool = True) -> set[Path]:
    """Return the files that a Python file imports, directly or not, itself included; through files
    below the folders or files ``within`` alone."""
    found, waiting = {start}, [start]
    while waiting:
        file = waiting.pop()
        if file.suffix != ".py":
            continue
        named = set(imports(file, discovered))
        if file.name.startswith("test_"):
            named.update(_fixtures_of(file))
        for other in named - found:
            place = other.relative_to(ROOT).as_posix()
            if any(place == root or place.startswith(f"{root}/") for root in within):
                found.add(other)
                waiting.append(other)
    return found


# --- Changed sources ----------------------------------------------------------------------------


@cache
def _versions() -> str:
    """Return the versions of what compiles and runs kernels."""
    named = [f"python {platform.python_version()}"]
    for package in ("torch", "triton"):
        try:
            named.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            named.append(f"no {package}")
    return ", ".join(named)


@cache
def _content(path: Path) -> bytes:
    return path.read_bytes()


def hash_of(files: Iterable[Path]) -> str:
    """Return a hash of files by name and content, and of the versions of torch, triton and
    Python."""
    whole = set(files)
    digest = hashlib.sha256(_versions().encode())
    for file in sorted(whole):
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + _content(file))
    return digest.hexdigest()[:16]


@cache
def sources_hash(start: Path, within: tuple[str, ...]) -> str:
    """Return the hash of what ``start`` imports within those folders and the tests' helpers.

    The folder of a kernel counts whole: C++ sources and tuned parameters are imported by nobody.
    """
    helpers = start.relative_to(ROOT).parent.as_posix()
    files = {start}
    for file in {start, *imports(start)}:
        if file == start or file.relative_to(ROOT).as_posix().startswith((*within, helpers)):
            files |= closure(file, (*within, helpers), discovered=False)
    folders = {file.parent for file in files if file.is_relative_to(ROOT / "kernels")}
    for folder in folders:
        files.update(file for file in folder.iterdir() if file.is_file())
    return hash_of(files)


def sources_of(item: pytest.Item) -> tuple[str, str] | None:
    """Return (name, hash) of the sources that a test depends on; None if it declares none."""
    mark = item.get_closest_marker("sources")
    if mark is not None:
        start, folders = Path(mark.kwargs.get("of", item.path)), mark.args
    else:
        start = item.path
        folders = next((SOURCES[f] for f in SOURCES if item.nodeid.startswith(f)), ())
    if not folders:
        return None
    return start.relative_to(ROOT).as_posix(), sources_hash(start, tuple(folders))


# --- Families -----------------------------------------------------------------------------------

FAMILY_FOLDERS = (
    "engine/models",
    "hybridcache/geometry/families",
    "tests/engine/numerics/families",
)
FAMILY_SOURCES = (
    "engine/runner",
    "engine/layers",
    "engine/models",
    "engine/weights",
    "engine/plugins",
    "kernels",
    "hybridcache/geometry",
    "tests/engine/numerics/families",
)


@cache
def family_names() -> frozenset[str]:
    """Return the names of all families: one file each."""
    files = (ROOT / FAMILY_FOLDERS[-1]).glob("[a-z]*.py")
    return frozenset(file.stem for file in files)


def _family_files(name: str) -> set[Path]:
    files = (ROOT / folder / f"{name}.py" for folder in FAMILY_FOLDERS)
    closures = [closure(file, FAMILY_SOURCES, discovered=False) for file in files if file.is_file()]
    return set().union(*closures)


@cache
def family_hash(name: str) -> str:
    """Return the hash of the files that a family needs and that no representative runs."""
    shared = set().union(*map(_family_files, REPRESENTATIVES))
    return hash_of(_family_files(name) - shared)


# --- Selection ----------------------------------------------------------------------------------


def cover(cases: Sequence[Sequence[str]]) -> list[int]:
    """Choose cases so that every value of every parameter is in one of them; their ranks.

    >>> product = [(a, b) for a in "xyz" for b in "12"]
    >>> [product[rank] for rank in cover(product)]
    [('x', '1'), ('y', '2'), ('z', '1')]
    """
    values = [set(enumerate(case)) for case in cases]
    missing = set().union(*values)
    chosen = []
    while missing:
        rank = max(range(len(cases)), key=lambda r: (len(missing & values[r]), -r))
        chosen.append(rank)
        missing -= values[rank]
    return sorted(chosen)


def _parameters(item: Any) -> list[str]:
    """Return the name of the item's value for each ``parametrize``."""
    return getattr(item.callspec, "_idlist", None) or [item.callspec.id]


def _case(item: pytest.Item) -> str:
    """Return the id of a case; "" of a test without parameters."""
    return item.nodeid.partition("[")[2][:-1]


def _refuse_unknown_ids(items: Sequence[pytest.Item]) -> None:
    """Check that each id of a ``full`` mark is that of a case."""
    named: dict[str, set[str]] = {}
    for item in items:
        mark = item.get_closest_marker("full")
        if mark is not None and mark.args:
            function = item.nodeid.partition("[")[0]
            named.setdefault(function, set(mark.args)).discard(_case(item))
    for function, unknown in named.items():
        if unknown:
            ids = ", ".join(map(repr, sorted(unknown)))
            raise pytest.UsageError(f"{function} has no case with the id {ids}: see its mark full.")


class Selection:
    """What this run leaves out, and the hashes of what it tests."""

    def __init__(self, known: dict[str, str]) -> None:
        self.known = known
        """Hashes of the last green run, by name."""
        self.hashes: dict[str, str] = {}
        self.left_out: list[pytest.Item] = []

    def is_changed(self, name: str, found: str) -> bool:
        self.hashes[name] = found
        return name in self.known and self.known[name] != found

    def choose(self, items: Sequence[pytest.Item]) -> list[pytest.Item]:
        """Return the items that run, in their order. UsageError: a mark names no case."""
        _refuse_unknown_ids(items)
        kept: set[pytest.Item] = set()
        products: dict[str, list[pytest.Item]] = {}
        for item in items:
            sources = sources_of(item)
            if sources is not None and self.is_changed(*sources):
                kept.add(item)
            elif self._wants(item):
                if hasattr(item, "callspec"):
                    products.setdefault(item.nodeid.partition("[")[0], []).append(item)
                else:
                    kept.add(item)
        for cases in products.values():
            kept.update(cases[rank] for rank in cover([_parameters(case) for case in cases]))
        self.left_out = [item for item in items if item not in kept]
        return [item for item in items if item in kept]

    def _wants(self, item: pytest.Item) -> bool:
        """Return whether the item is in no group that is left out."""
        mark = item.get_closest_marker("full")
        if mark is not None and _case(item) not in mark.args:
            return False
        return all(
            family in REPRESENTATIVES or self.is_changed(f"family {family}", family_hash(family))
            for family in self._families(item)
        )

    @staticmethod
    def _families(item: pytest.Item) -> list[str]:
        """Return the families that a case is parametrized with; a variant counts as its family."""
        if not item.nodeid.startswith(FAMILY_FOLDERS[-1].rpartition("/")[0]):
            return []
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        names = sorted(family_names(), key=len, reverse=True)
        words = [value for value in values if isinstance(value, str)]
        found = [[n for n in names if word == n or word.startswith(f"{n}_")] for word in words]
        return [of_word[0] for of_word in found if of_word]


_FEWER: set[int] = set()


def draw_fewer(item: pytest.Item) -> None:
    """Let a hypothesis test, or a state machine, draw as many examples as the level allows."""
    profile = settings.get_current_profile_name()
    default = settings.get_profile(profile).max_examples

    def fewer(asked: settings) -> settings:
        if asked.max_examples == default:
            return asked
        return settings(asked, max_examples=num_examples(asked.max_examples))

    function: Any = getattr(item, "obj", None)
    function = getattr(function, "__func__", function)
    own = getattr(function, "_hypothesis_internal_use_settings", None)
    if isinstance(own, settings) and id(function) not in _FEWER:
        _FEWER.add(id(function))
        function._hypothesis_internal_use_settings = fewer(own)
    machine: Any = getattr(item, "cls", None)
    asked = getattr(machine, "settings", None)
    if isinstance(asked, settings) and id(machine) not in _FEWER:
        _FEWER.add(id(machine))
        machine.settings = fewer(asked)


def has_torch_fixtures(path: Path) -> bool:
    """Return whether the fixtures of a file or folder of tests need torch."""
    folders = path.relative_to(ROOT).parents if path.is_relative_to(ROOT) else ()
    found = (ROOT / folder / "conftest.py" for folder in folders)
    conftests = [file for file in (*found, path / "conftest.py") if file.is_file()]
    return any("\nimport torch\n" in file.read_text(encoding="utf-8") for file in conftests)


def scope_of(nodeid: str) -> str:
    """Return what a worker runs in one piece: a file, or a folder whose fixtures are expensive."""
    path = nodeid.partition("::")[0]
    return next((folder for folder in TOGETHER if path.startswith(folder)), path)


TOUCHY = re.compile(
    r"^\s*(?:import|from) (?:subprocess|signal|socket|multiprocessing|tempfile|httpx|shutil)\b",
    re.M,
)
"""Imports of tests that start processes, open sockets or write files of their own."""


@cache
def _file_rank(path: Path) -> int:
    return 1 if TOUCHY.search(path.read_text(encoding="utf-8")) else 2


def rank(item: pytest.Item) -> int:
    """Return when an item runs, if several processes share the work: first folders that one of
    them runs alone, then files that wait for processes and sockets, so that none ends the run."""
    return 0 if scope_of(item.nodeid).endswith("/") else _file_rank(item.path)
