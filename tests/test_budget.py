"""Test that lines, flags and walks are within ``tests/budget.json``."""

from __future__ import annotations

import pytest

from hybridcache.config import CacheConfig
from tests import budget


def test_numbers_are_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    *given, _ = CacheConfig.__init__.__defaults__ or ()
    monkeypatch.setattr(CacheConfig.__init__, "__defaults__", (*given, False))  # See conftest.
    found, limits = budget.measure(), budget.read_store()
    assert found.keys() == limits.keys()
    assert min(found.values()) > 50
    above = {name: number for name, number in found.items() if number > limits[name]}
    assert not above, "\n".join(
        [
            *budget.compare(above, {name: limits[name] for name in above}),
            "remove elsewhere, or raise tests/budget.json with the reason in the commit",
        ]
    )
