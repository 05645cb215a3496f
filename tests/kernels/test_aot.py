"""Every Triton kernel compiles for NVIDIA and AMD targets and fits their shared memory; no GPU is needed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
SPEC = importlib.util.spec_from_file_location("aot", HERE / "aot.py")
aot = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(aot)


@pytest.mark.parametrize("launches", sorted((HERE / "launches").glob("*.py")), ids=lambda p: p.stem)
def test_compiles_ahead_of_time(launches: Path) -> None:
    run = subprocess.run(
        [sys.executable, HERE / "aot.py", launches], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    records = [json.loads(line) for line in run.stdout.splitlines()]
    assert {record["target"] for record in records} == set(aot.TARGETS)
    too_large = [r for r in records if r["shared_bytes"] > aot.SHARED_BYTES[r["target"]]]
    assert not too_large
