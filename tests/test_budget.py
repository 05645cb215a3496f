"""Test that numbers are within ``tests/budget.json``, and that the reading path of
``docs/architecture.md`` follows a walk."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from hybridcache.config import CacheConfig
from tests import budget, mutation
from tests.selection import ROOT

Functions = dict[tuple[str, int], str]
PAGE = ROOT / "docs" / "architecture.md"
PATH_LINES = 1500


@pytest.fixture(scope="module")
def measured() -> Iterator[tuple[dict[str, int], dict[str, Functions]]]:
    """Numbers, and the functions of each walk."""
    with pytest.MonkeyPatch.context() as patch:
        *given, _ = CacheConfig.__init__.__defaults__ or ()
        patch.setattr(CacheConfig.__init__, "__defaults__", (*given, False))  # See conftest.
        walks: dict[str, Functions] = {}
        yield budget.measure(walks), walks


def test_numbers_are_within_the_budget(
    measured: tuple[dict[str, int], dict[str, Functions]],
) -> None:
    found, limits = measured[0], budget.read_store()
    assert found.keys() == limits.keys()
    assert min(found.values()) > 5
    above = {name: number for name, number in found.items() if number > limits[name]}
    rule = "raise a price by up to 20 lines with a test and the reason (--update); for "
    rule += "more remove as many elsewhere, or name the issue that grants them"
    limits = {name: limits[name] for name in above}
    assert not above, "\n".join([*budget.compare(above, limits), rule])


def test_mutants_judge_most_lines_with_logic() -> None:
    """Of the product in Python. The lines of studies, and of kernels for GPUs, are the others."""
    counts, total = mutation.share()
    assert sum(counts.values()) >= 0.7 * total


def test_the_page_prints_the_limits() -> None:
    part = PAGE.read_text().partition("## Sizes")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| ([\w ]+) \| ([\d,]+) \|$", part, re.M))
    limits = budget.read_store()
    assert len(rows) > 4
    found = [budget.rises({"tests: Jamba": limits["tests: Jamba"] + n}) for n in (30, 9, 0)]
    assert [len(one) for one in found] == [1, 1, 0] and "more than 20" in found[0][0]
    assert rows == {name: f"{limits[name]:,}" for name in rows}


@cache
def definitions(file: str) -> dict[str, int]:
    """Return the lines of each class and function of a file, by qualified name."""
    found = {}
    for node in ast.parse((ROOT / file).read_text()).body:
        members = node.body if isinstance(node, ast.ClassDef) else []
        for one in (node, *members):
            if isinstance(one, ast.ClassDef | ast.FunctionDef):
                name = one.name if one is node else f"{node.name}.{one.name}"
                found[name] = (one.end_lineno or 0) - one.lineno + 1
    return found


def test_the_reading_path_follows_a_request(
    measured: tuple[dict[str, int], dict[str, Functions]],
) -> None:
    part = PAGE.read_text().partition("## A reading path")[2].partition("\n## ")[0]
    links = re.findall(r"(\| )?\[`([\w.]+)`\]\(\.\./([\w/.]+)\)", part)
    lines = [definitions(file)[name] for _, name, file in links]
    assert len(links) > 25 and 500 < sum(lines) <= PATH_LINES
    walk = [
        (file.removeprefix(f"{ROOT}/"), name)
        for (file, _), name in measured[1]["generate_walk"].items()
    ]
    places = [walk.index((file, name)) for in_table, name, file in links if in_table]
    wrong = [links[at][1] for at in range(1, len(places)) if places[at] < places[at - 1]]
    assert wrong == [], "these run before the function above them"
