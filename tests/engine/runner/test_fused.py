"""The engine with all Triton kernels: close to the reference, with exact hits.

Without a GPU, Triton's interpreter runs them.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch.testing import assert_close

from engine import EngineConfig
from engine.engine import load_runner
from engine.layers.blocks import Rows
from engine.models import read_model
from engine.runner.backends import Kernels, override_all
from engine.runner.device import Device
from engine.runner.model_runner import ModelRunner
from engine.weights.checkpoint import Dummy
from engine.weights.model_config import ModelError
from engine.weights.parameters import Build, WeightSpec
from engine.weights.products import Experts, expert_names
from kernels.linear.formats import QuantizedRows
from tests.engine.device_models import TINY
from tests.engine.small_models import Driver, random_tokens
from tests.kernels import interpreter

pytest.importorskip("triton")
linear, moe, norm = (
    pytest.importorskip(f"kernels.{name}.fused") for name in ("linear", "moe", "norm")
)
PRODUCTS = "linear=fused,moe=fused"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def make_runner(path, device: str | None = "cpu", **options) -> ModelRunner:
    interpreter.repair()
    config = EngineConfig(
        model=str(path), device=device, dtype="float32", cache_gib=0.04, **options
    )
    return load_runner(config)


def cold_and_mixed(runner, tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of ``Driver.cold_and_mixed`` with scattered rows."""
    return Driver(runner, scatter_seed=3).cold_and_mixed(tokens)


@pytest.mark.full
@pytest.mark.parametrize("name", ["qwen3_next", "kimi_linear", "nemotron_h"])
def test_engine_with_all_triton_kernels(name, oracles) -> None:
    path, tokens = oracles(name).path, random_tokens(100, 5)
    expected = cold_and_mixed(make_runner(path), tokens)
    runner = make_runner(path, "cpu" if INTERPRETED else None, kernels=override_all("fused"))
    assert set(runner.kernels.words().values()) == {"fused"}
    cold, mixed = cold_and_mixed(runner, tokens)
    assert_close(cold.cpu(), expected[0], rtol=0, atol=1e-5)
    assert_close(mixed.cpu(), expected[1], rtol=0, atol=1e-5)
    assert torch.equal(mixed[1:], cold[64:])


@pytest.mark.full("int8-qwen3_next", "fp8-qwen3_next")
@pytest.mark.parametrize("name", ["qwen3_next", "kimi_linear"])
@pytest.mark.parametrize(
    "error, options",
    [
        (0.06, {"quantization": "int8"}),
        (0.15, {"quantization": "fp8"}),
        (0.2, {"quantization": "fp8", "fp8_activations": True, "kernels": PRODUCTS}),
    ],
    ids=["int8", "fp8", "fp8-activations"],
)
def test_8_bit_weights_are_close_and_hits_exact(name, oracles, error, options) -> None:
    """The error is relative to the standard deviation of the logits.

    The prompt is short because the interpreter runs a program for each row of a product.
    """
    path, tokens = oracles(name).path, random_tokens(72, 6)
    full, _ = cold_and_mixed(make_runner(path), tokens)
    runner = make_runner(path, **options)
    cold, mixed = cold_and_mixed(runner, tokens)
    assert 0 < (cold - full).square().mean().sqrt() < error * full.std()
    assert torch.equal(mixed[1:], cold[64:])


@pytest.mark.skipif(not INTERPRETED, reason="compares two models on the CPU")
@pytest.mark.parametrize("num_tokens", [2, 6])
def test_rows_quantised_by_norms_and_experts_change_no_bit(num_tokens, monkeypatch) -> None:
    """A layer with Gated DeltaNet and experts, and the projection of the next one, with rows that
    norms quantise, and with rows that each product quantises."""
    interpreter.repair()
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "linear_value_head_dim": 128}
    sizes |= {"shared_expert_intermediate_size": 128, "linear_num_value_heads": 1}
    family, config = read_model(TINY | sizes)
    kernels = Kernels(Device.resolve("cpu"), override_all("fused"))
    spec = WeightSpec(torch.device("cpu"), torch.bfloat16, "fp8", fp8_activations=True)
    names = expert_names("experts.{}", "gate_proj", "up_proj", "down_proj")
    experts = config.sizes.layers[0].mlp
    assert Experts("experts", 128, experts, names, Build(kernels, spec), shared=names).has_shared
    torch.manual_seed(4)
    mixed = torch.randn(num_tokens, 1, 128).to(torch.bfloat16)
    kinds = []

    def outputs() -> list[torch.Tensor]:
        model = family(config, Build(kernels, spec), Dummy(0).fill)
        rows, ids = Rows(num_tokens), torch.arange(num_tokens)
        projected, stream = model.advance(0, model.embedding(ids), None, rows)
        step = model.mixers[0]
        kinds.append(type(step.enter(stream, None)[0]))
        hidden = step.leave(step.block.finish(mixed, projected))
        return [projected, *model.advance(1, hidden, stream, rows)]

    together = outputs()
    monkeypatch.setattr(linear.Product, "takes_fp8_rows", lambda self, size: False)
    monkeypatch.delattr(norm, "rms_norm_rows")
    monkeypatch.setattr(moe, "LEAST_NARROW", 100)
    assert all(map(torch.equal, together, outputs()))
    assert kinds == [QuantizedRows, torch.Tensor]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"quantization": "fp8"}, "needs a GPU with fp8 products"),
        ({"kernels": PRODUCTS}, "needs fp8 weights"),
    ],
)
def test_fp8_activations_without_fp8_products_are_refused(oracles, options, message) -> None:
    with pytest.raises(ModelError, match=f"fp8_activations {message}"):
        make_runner(oracles("qwen3_next").path, fp8_activations=True, **options)
