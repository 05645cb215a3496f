"""Doctests of all modules and of the package's README."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import hybridcache

ROOT = Path(hybridcache.__file__).parent.parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in ("hybridcache", "engine")
    for path in (ROOT / package).rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_doctests_of_modules(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed


def test_doctests_of_the_readme() -> None:
    readme = Path(hybridcache.__file__).parent / "README.md"
    result = doctest.testfile(str(readme), module_relative=False)
    assert result.attempted > 10 and not result.failed
