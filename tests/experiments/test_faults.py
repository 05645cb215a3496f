"""Quick cases of ``make faults``."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.system.faults.__main__ import live_faults
from experiments.system.faults.files import damaged, full_disk


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_server_survives_killed_clients_and_a_step_without_memory() -> None:
    names = ("killed clients", "out of memory in a step")
    records = list(live_faults(names))
    assert [record["fault"] for record in records] == list(names)
    assert all(record["memory"]["held"] == 0 < record["memory"]["free"] for record in records)


def test_full_disk_leaves_the_last_snapshot(tmp_path: Path) -> None:
    full_disk(tmp_path)


def test_damaged_snapshots_are_rejected_or_load_correctly(tmp_path: Path) -> None:
    assert damaged(tmp_path, 24) >= 12
