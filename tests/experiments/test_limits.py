"""Least work of launches, and the table of the documentation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from experiments.gpu import limits

ROOT = Path(__file__).parent.parent.parent


def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_a_product_reads_its_weight_once() -> None:
    args = {"x": new(4, 32), "w": new(64, 32, dtype=torch.int8), "scale": new(64), "y": new(4, 64)}
    work = limits.work_of(("linear_kernel", args), 4, 100)
    assert work.num_bytes == 4 * 32 * 2 + 64 * 32 + 64 * 2 + 4 * 64 * 2
    assert work.num_flops == 2 * 4 * 32 * 64
    assert work.expected_s > limits.GAP_S and work.least_s < work.expected_s


def test_one_token_reads_its_experts_and_the_shared_one() -> None:
    args = {"x": new(1, 8), "w": new(513, 4, 8), "w_scale": new(513, 4), "inner": new(11, 2)}
    work = limits.work_of(("gate_up_kernel", args), 1, 100)
    assert work.num_bytes == pytest.approx(11 * (4 * 8 * 2 + 4 * 2) + 8 * 2 + 11 * 2 * 2)


def test_states_are_read_and_written() -> None:
    args = {"p_states": new(9, 3, 5), "p_slots": new(2, dtype=torch.int32), "p_x": new(2, 3)}
    work = limits.work_of(("decode_kernel", args), 2, 100)
    assert work.num_bytes == 2 * 2 * 15 * 2 + 2 * 4 + 2 * 3 * 2


@pytest.mark.full
def test_the_table_is_that_of_the_documentation() -> None:
    text = (ROOT / "docs/kernels/triton.md").read_text(encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "experiments.gpu.limits"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) == 2 + len(limits.BATCHES) + 1
    assert set(found.stdout.splitlines()) <= set(text.splitlines())
