"""The engine with all Triton kernels: close to the reference, with exact hits.

Without a GPU, Triton's interpreter runs them.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch.testing import assert_close

from engine import engine_config
from engine.runner.backends import all_fused
from engine.runner.build import load_runner
from engine.runner.model_runner import ModelRunner
from experiments.gpu import interpreter

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def make_runner(path, device: str | None = "cpu", **options) -> ModelRunner:
    config = engine_config(
        model=str(path), device=device, dtype="float32", cache_gib=0.04, **options
    )
    return load_runner(config)


def cold_and_mixed(driver_class, runner, tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of ``Driver.cold_and_mixed`` with scattered rows."""
    return driver_class(runner, scatter_seed=3).cold_and_mixed(tokens)


@pytest.mark.full
@pytest.mark.parametrize("name", ["qwen3_next", "kimi_linear", "nemotron_h"])
def test_engine_with_all_triton_kernels(name, oracles, driver_class, random_tokens) -> None:
    interpreter.repair()
    path, tokens = oracles(name).path, random_tokens(100, 5)
    expected = cold_and_mixed(driver_class, make_runner(path), tokens)
    runner = make_runner(path, "cpu" if INTERPRETED else None, kernels=all_fused())
    assert set(runner.kernels.words().values()) == {"fused"}
    cold, mixed = cold_and_mixed(driver_class, runner, tokens)
    assert_close(cold.cpu(), expected[0], rtol=0, atol=1e-5)
    assert_close(mixed.cpu(), expected[1], rtol=0, atol=1e-5)
    assert torch.equal(mixed[1:], cold[64:])


@pytest.mark.parametrize("name", ["qwen3_next", "kimi_linear"])
@pytest.mark.parametrize("quantization, error", [("int8", 0.06), ("fp8", 0.15)])
def test_8_bit_weights_are_close_and_hits_exact(
    name, oracles, driver_class, random_tokens, quantization, error
) -> None:
    """The error is relative to the standard deviation of the logits."""
    path, tokens = oracles(name).path, random_tokens(100, 6)
    full, _ = cold_and_mixed(driver_class, make_runner(path), tokens)
    runner = make_runner(path, quantization=quantization)
    cold, mixed = cold_and_mixed(driver_class, runner, tokens)
    assert 0 < (cold - full).square().mean().sqrt() < error * full.std()
    assert torch.equal(mixed[1:], cold[64:])
