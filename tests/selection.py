"""Selection of a representative part of the suite for `make test`; `make test-all` runs all.

The level is "quick" unless the environment variable HYBRIDCACHE_TESTS is "all". At level "quick":

- Tests marked ``full`` are skipped, except for the cases that the mark lists.
- Of a test with several parameters, each value runs once, not every combination.
- Of the model families, only REPRESENTATIVES run.
- Kernels in the interpreter run in bfloat16, unless a mark lists a case in float32.
- Hypothesis draws fewer examples.

Cases named on the command line (``file::test``) always run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
REPRESENTATIVES = ("qwen3_next", "granite_moe_hybrid", "qwen3")
"""Model families of `make test`: Gated DeltaNet with experts, Mamba-2, pure attention."""
INTERPRETED_TWICE = "fp32-fused"  # The same kernels also run in bfloat16.
NUMERICS = (
    *("tests/engine/models/", "tests/engine/runner/"),
    *("tests/engine/weights/", "tests/engine/weights/forms/"),
)
"""Folders with tests of each model family."""
SERVER = "tests/engine/front/server/", "tests/engine/front/server/endpoints/"
TOGETHER = {folder: group[0] for group in (NUMERICS, SERVER) for folder in group}
"""Folders that share expensive session fixtures, and the name of their scope: at level "quick" one
worker runs all of their tests."""
APART = "tests/kernels/test_aot.py", "tests/engine/models/test_published_sizes.py"
"""Files with long cases that share nothing: workers take them one by one."""
LONG = (
    "tests/experiments/benchmarks/test_second_turn.py",
    "tests/kernels/test_scan.py",
    "tests/test_budget.py",
    "tests/test_examples.py",
    "tests/test_readme.py",
    "tests/test_replay.py",
)
"""Files that take longest alone, or long ones at the end of the order."""
EMULATED = "QEMU_CPU" in os.environ
"""True in an emulator of another processor (`make test-environments`)."""
QUICK_SHARE = 4
"""Level "quick" draws the number of hypothesis examples divided by this."""


def level() -> str:
    """Return "quick" or "all"."""
    value = os.environ.get("HYBRIDCACHE_TESTS", "quick")
    if value not in ("quick", "all"):
        raise pytest.UsageError(f"HYBRIDCACHE_TESTS must be quick or all (got {value!r}).")
    return "all" if os.environ.get("KERNELS_ON_DEVICE") == "1" else value


def is_quick() -> bool:
    return level() == "quick"


def num_examples(full_count: int) -> int:
    """Return how many of ``full_count`` hypothesis examples this level draws."""
    return full_count if level() == "all" else max(2, full_count // QUICK_SHARE)


# --- Families -----------------------------------------------------------------------------------


@cache
def family_names() -> frozenset[str]:
    """Return the names of all families. Each has one file."""
    return frozenset(file.stem for file in (ROOT / "tests/engine/families").glob("[a-z]*.py"))


def families(item: pytest.Item) -> list[str]:
    """Return the families in the parameters of a case. Variants count as their family."""
    if not item.nodeid.startswith((*NUMERICS, "tests/engine/front/command/")):
        return []
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    names = sorted(family_names(), key=len, reverse=True)
    words = [value for value in values if isinstance(value, str)]
    found = [[n for n in names if word == n or word.startswith(f"{n}_")] for word in words]
    return [of_word[0] for of_word in found if of_word]


# --- Selection ----------------------------------------------------------------------------------


def cover(cases: Sequence[Sequence[str]]) -> list[int]:
    """Return the indices of cases that together contain every value of every parameter.

    >>> product = [(a, b) for a in "xyz" for b in "12"]
    >>> [product[index] for index in cover(product)]
    [('x', '1'), ('y', '2'), ('z', '1')]
    """
    values = [set(enumerate(case)) for case in cases]
    missing = set().union(*values)
    chosen = []
    while missing:
        index = max(range(len(cases)), key=lambda i: (len(missing & values[i]), -i))
        chosen.append(index)
        missing -= values[index]
    return sorted(chosen)


def _parameters(item: Any) -> list[str]:
    """Return the id of the item's value for each ``parametrize``."""
    return getattr(item.callspec, "_idlist", None) or [item.callspec.id]


def _case(item: pytest.Item) -> str:
    """Return the id of a case, or "" if the test has no parameters."""
    return item.nodeid.partition("[")[2][:-1]


def _refuse_unknown_ids(items: Sequence[pytest.Item]) -> None:
    """Raise UsageError if an id in a ``full`` mark does not match a case."""
    named: dict[str, set[str]] = {}
    for item in items:
        mark = item.get_closest_marker("full")
        if mark is not None and mark.args:
            function = item.nodeid.partition("[")[0]
            named.setdefault(function, set(mark.args)).discard(_case(item))
    for function, unknown in named.items():
        if unknown:
            ids = ", ".join(map(repr, sorted(unknown)))
            raise pytest.UsageError(
                f"{function} has no case with the id {ids}, which its mark 'full' lists."
            )


def is_selected(item: pytest.Item) -> bool:
    """Return whether neither mark ``full``, dtype nor family of the item deselects it."""
    mark = item.get_closest_marker("full")
    is_named = _case(item) in mark.args if mark else INTERPRETED_TWICE not in _case(item)
    return is_named and all(family in REPRESENTATIVES for family in families(item))


def choose(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Return the items to run, in their order.

    Raises UsageError if a mark lists a case that does not exist.
    """
    _refuse_unknown_ids(items)
    kept: set[pytest.Item] = set()
    products: dict[str, list[pytest.Item]] = {}
    for item in filter(is_selected, items):
        if hasattr(item, "callspec"):
            products.setdefault(item.nodeid.partition("[")[0], []).append(item)
        else:
            kept.add(item)
    for cases in products.values():
        kept.update(cases[index] for index in cover([_parameters(case) for case in cases]))
    return [item for item in items if item in kept]


_FEWER: set[int] = set()


def draw_fewer(item: pytest.Item) -> None:
    """Reduce the examples of a hypothesis test or state machine to ``num_examples``."""
    profile = settings.get_current_profile_name()
    default = settings.get_profile(profile).max_examples

    def fewer(given: settings) -> settings:
        if given.max_examples == default:
            return given
        return settings(given, max_examples=num_examples(given.max_examples))

    function: Any = getattr(item, "obj", None)
    function = getattr(function, "__func__", function)
    own = getattr(function, "_hypothesis_internal_use_settings", None)
    if isinstance(own, settings) and id(function) not in _FEWER:
        _FEWER.add(id(function))
        function._hypothesis_internal_use_settings = fewer(own)
    machine: Any = getattr(item, "cls", None)
    given = getattr(machine, "settings", None)
    if isinstance(given, settings) and id(machine) not in _FEWER:
        _FEWER.add(id(machine))
        machine.settings = fewer(given)


def scope_of(nodeid: str) -> str:
    """Return the unit that one worker runs: a file, a case of ``APART``, or at level "quick" a
    group of folders with expensive fixtures. At level "all" one worker would run the group alone,
    and leave the others idle."""
    path = nodeid.partition("::")[0]
    if path in APART:
        return nodeid
    if not is_quick():
        return path
    return TOGETHER.get(path.rpartition("/")[0] + "/", path)


TOUCHY = re.compile(
    r"^\s*(?:import|from) (?:subprocess|signal|socket|multiprocessing|tempfile|httpx|shutil)\b",
    re.M,
)
"""Imports of tests that start processes, open sockets or write files."""


@cache
def _file_rank(path: Path) -> int:
    return 1 if TOUCHY.search(path.read_text(encoding="utf-8")) else 2


def rank(item: pytest.Item) -> int:
    """Return the sort key of an item for a run in several processes.

    Folders of ``TOGETHER`` and files of ``LONG`` come first, then files that wait for processes and
    sockets: a long scope that starts last would delay the end of the run.
    """
    scope = scope_of(item.nodeid)
    return 0 if scope.endswith("/") or scope in LONG else _file_rank(item.path)
