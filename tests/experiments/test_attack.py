"""Tests of the random attacks: they detect injected faults, and pass without one."""

from __future__ import annotations

import pytest

from engine.server.api_errors import APIError
from experiments.system.attack import __main__ as attack
from experiments.system.attack import bodies, cache, churn
from experiments.system.attack.runner import ChainRunner
from hybridcache.hybrid import HybridRadixCache


@pytest.mark.full("cache")
@pytest.mark.parametrize("part", sorted(attack.PARTS))
def test_each_part_of_the_attack_passes(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert attack.main(["--only", part, "--minutes", "0.02", "--seed", "5"]) == 0
    assert f"{part}: passed; " in capsys.readouterr().out


def test_wrong_rows_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    gather = HybridRadixCache.gather
    monkeypatch.setattr(HybridRadixCache, "gather", lambda self, node: gather(self, node)[::-1])
    with pytest.raises(AssertionError, match="cache, seed"):
        cache.attack(0, 30)


def test_wrong_answer_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    read = ChainRunner._read
    monkeypatch.setattr(ChainRunner, "_read", lambda *one: read(*one) ^ (one[1].start > 64))
    with pytest.raises(AssertionError, match="churn, seed"):
        churn.attack(0, 30)


def test_server_error_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(APIError, "response", lambda self: 1 // 0)
    with pytest.raises(AssertionError, match="bodies, seed"):
        bodies.attack(0, 30)
