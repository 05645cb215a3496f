"""Each load of ``python -m tests.endurance`` passes in its small size and detects a fault."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis.stateful import RuleBasedStateMachine, rule

from hybridcache.radix.cache import HybridRadixCache
from tests.endurance.__main__ import PARTS, main, run
from tests.endurance.fuzz import play


@pytest.mark.full("cache", "stores")
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("part", [name for name in PARTS if name not in ("hostile", "clients")])
def test_each_part_passes(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--size", "small", "--seed", "5", *(["--only", "default"] * (part == "faults"))]
    assert main([part, *options]) == 0, capsys.readouterr().out


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_a_server_with_weights_of_four_bits_survives_a_fault() -> None:
    assert run("faults", "1", only="int4")["int4"].keys() == {"out_of_memory_in_a_step"}


def test_wrong_rows_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    gather = HybridRadixCache.gather
    monkeypatch.setattr(HybridRadixCache, "gather", lambda self, node: gather(self, node)[::-1])
    with pytest.raises(AssertionError, match="seed"):
        run("cache", "small")


class Faulty(RuleBasedStateMachine):
    """A counter that fails from 3 on."""

    count = 0

    @rule()
    def add(self) -> None:
        self.count += 1
        assert self.count < 3

    @rule()
    def rest(self) -> None:
        pass


def test_new_operations_that_fail_are_shrunk() -> None:
    """The failure names the seed, and the fewest operations that repeat it."""
    with pytest.raises(AssertionError, match="Faulty, seed 3: ") as failure:
        play(Faulty, 3)
    operations = [line for line in str(failure.value).splitlines() if line.startswith("state.")]
    assert operations == ["state.add()"] * 3 + ["state.teardown()"]
