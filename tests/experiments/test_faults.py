"""Quick cases of ``make faults``."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.system.faults.__main__ import live_faults


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_server_survives_killed_clients_and_a_step_without_memory() -> None:
    names = ("killed clients", "out of memory in a step")
    records = list(live_faults(names))
    assert [record["fault"] for record in records] == list(names)
    assert all(record["memory"]["held"] == 0 < record["memory"]["free"] for record in records)
