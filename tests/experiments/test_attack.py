"""The attack finds what is broken, and holds for a moment on what is not."""

from __future__ import annotations

import pytest

from engine.server.api_errors import APIError
from experiments.system.attack import __main__ as attack
from experiments.system.attack import bodies, cache, churn
from experiments.system.attack.runner import ChainRunner
from hybridcache.hybrid import HybridRadixCache


@pytest.mark.full("cache")
@pytest.mark.parametrize("part", sorted(attack.PARTS))
def test_each_part_holds_for_a_moment(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert attack.main(["--only", part, "--minutes", "0.02", "--seed", "5"]) == 0
    assert f"{part}: held; " in capsys.readouterr().out


def test_rows_of_another_prefix_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    gather = HybridRadixCache.gather
    monkeypatch.setattr(HybridRadixCache, "gather", lambda self, node: gather(self, node)[::-1])
    with pytest.raises(AssertionError, match="cache, seed"):
        cache.attack(0, 30)


def test_an_answer_that_is_anothers_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    read = ChainRunner._read
    monkeypatch.setattr(ChainRunner, "_read", lambda *one: read(*one) ^ (one[1].start > 64))
    with pytest.raises(AssertionError, match="churn, seed"):
        churn.attack(0, 30)


def test_a_server_error_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(APIError, "response", lambda self: 1 // 0)
    with pytest.raises(AssertionError, match="bodies, seed"):
        bodies.attack(0, 30)
