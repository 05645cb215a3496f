"""Each load of ``python -m tests.endurance`` passes in its small size."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.endurance.__main__ import PARTS, main, run


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
