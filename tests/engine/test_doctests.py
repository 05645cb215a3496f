"""The examples in the docstrings of what people read first."""

from __future__ import annotations

import doctest
from types import ModuleType

import pytest

from engine import exit_codes
from engine.command import flags, inspect
from engine.drafts import pace, suffix
from engine.text import json_text, templates, tokenizer
from engine.text.answers import marks
from hybridcache import units
from hybridcache.scheduling import sessions

MODULES = [
    exit_codes,
    flags,
    inspect,
    json_text,
    marks,
    pace,
    sessions,
    suffix,
    templates,
    tokenizer,
    units,
]


@pytest.mark.parametrize("module", MODULES)
def test_examples(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0
