"""Tests of the comparison of logits between GPU and CPU: strict in float32, within rounding errors
in bfloat16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from experiments.gpu import parity as gpu_parity
from experiments.gpu.models import TINY, write_checkpoint
from experiments.gpu.parity import Feed, compare, make_runner

PLAIN = {"device": "cpu", "kernels": "", "cache_gib": 0.02}


def logits(path: str, dtype: str, tokens: list[int]) -> torch.Tensor:
    feed = Feed(make_runner(path, True, dtype, **PLAIN))
    return feed.forward([(feed.place(tokens), 0, len(tokens))])[0].float()


def test_rounding_errors_pass_and_wrong_logits_fail(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, TINY | {"num_experts": 0})
    tokens = np.random.default_rng(0).integers(0, 256, 100).tolist()
    expected, rounded = (logits(path, dtype, tokens) for dtype in ("float32", "bfloat16"))
    assert compare(expected, expected)["passed"]
    assert not compare(rounded, expected)["passed"]  # Float32 has a strict tolerance.
    found = compare(rounded, expected, rounded)
    assert found["passed"] and 0 < found["relative_error"] < 0.1
    twice_as_far = expected + 2 * (rounded - expected)
    assert not compare(twice_as_far, expected, rounded)["passed"]
    shifted = expected.roll(1, dims=0)
    assert not compare(shifted, expected, rounded)["passed"]
    assert not compare(torch.full_like(expected, torch.nan), expected, rounded)["passed"]


def test_bound_of_bfloat16_is_relative_to_the_error_on_the_cpu(tmp_path: Path, monkeypatch) -> None:
    """With the CPU as device, the bound is exactly the factor times its error."""
    make = gpu_parity.make_runner
    monkeypatch.setattr(
        gpu_parity, "make_runner", lambda path, dry, dtype, **_: make(path, dry, dtype, **PLAIN)
    )
    path = write_checkpoint(tmp_path, TINY | {"num_experts": 0})
    record = gpu_parity.parity(path, True, "bfloat16", list(range(70)))
    assert record["passed"] and record["dtype"] == "bfloat16"
    assert record["bound"] == gpu_parity.MORE_THAN_CPU * record["relative_error"] > 0
    assert gpu_parity.parity(path, True, "float32", list(range(70)))["relative_error"] == 0
