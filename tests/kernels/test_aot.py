"""Compilation of all Triton kernels for NVIDIA and AMD targets: shared memory and registers.

No GPU is needed.
"""

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


WGMMA_KERNELS = {
    "solve_kernel",
    "weigh_kernel",
    "scan_kernel",
    "prefill_attention_kernel",
    "prefill_mla_kernel",
    "multiply_heads_kernel",
    "linear_kernel",
    "gate_up_kernel",
    "down_kernel",
}
"""Kernels with products large enough for Hopper's tensor core instructions, in tiles of 64.

Decode attention is not: it has 16 rows.
"""


ALLOWED_SPILL_BYTES = {"large_state": 128, "tiles_of_32": 32}
"""Spilled bytes per thread by launch: states of 256 rows, and Gated DeltaNet in tiles of 32."""


LAUNCHES = [
    pytest.param(path, id=path.stem, marks=pytest.mark.sources("kernels", of=path))
    for path in sorted((HERE / "launches").glob("*.py"))
]


@pytest.mark.full
@pytest.mark.parametrize("launches", LAUNCHES)
def test_kernels_compile_and_fit_their_targets(launches: Path) -> None:
    run = subprocess.run(
        [sys.executable, HERE / "aot.py", launches], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    records = [json.loads(line) for line in run.stdout.splitlines()]
    assert {record["target"] for record in records} == set(aot.TARGETS)
    assert [r for r in records if r["shared_bytes"] > aot.SHARED_BYTES[r["target"]]] == []
    # float32 products have no tensor cores, and sm_80 and sm_89 are not tuned for speed.
    slow = ("sm_80", "sm_89")
    fast = [r for r in records if "float32" not in r["launch"] and r["target"] not in slow]
    assert [r for r in fast if r["spilled_bytes"] > ALLOWED_SPILL_BYTES.get(r["launch"], 0)] == []
    hopper = [r for r in fast if r["target"] == "sm_90"]
    assert [r for r in hopper if r["serialised"]] == []
    large = [r for r in hopper if not r["launch"].startswith("tiles_of_")]
    assert [r for r in large if r["kernel"] in WGMMA_KERNELS and not r["wgmma"]] == []
