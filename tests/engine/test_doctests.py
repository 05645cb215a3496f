"""The examples in the docstrings of what people read first."""

from __future__ import annotations

import doctest
from types import ModuleType

import pytest

from engine.command import flags, inspect
from engine.drafts import pace, suffix
from engine.text import templates, tokenizer
from engine.text.answers import marks
from hybridcache import units


@pytest.mark.parametrize(
    "module", [flags, inspect, marks, pace, suffix, templates, tokenizer, units]
)
def test_examples(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0
