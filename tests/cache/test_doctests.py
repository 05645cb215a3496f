"""The examples in the cache's documentation are true."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import hybridcache

MODULES = (
    "allocators.budget",
    "allocators.pages",
    "allocators.slots",
    "build",
    "export.events",
    "extras",
    "hybrid",
    "kv_only",
    "null",
    "policies.words",
    "routing.hashing",
    "routing.load",
    "routing.on_the_way",
    "routing.outbox",
    "tokens",
    "stats",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_the_code(name):
    result = doctest.testmod(importlib.import_module(f"hybridcache.{name}"))
    assert result.attempted and not result.failed


def test_examples_in_the_readme():
    readme = Path(hybridcache.__file__).parent / "README.md"
    result = doctest.testfile(str(readme), module_relative=False)
    assert result.attempted > 10 and not result.failed
