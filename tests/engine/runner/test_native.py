"""Native kernels in the engine: exact hits and batches, with and without recording, and close to
the references. They are optional."""

from __future__ import annotations

import pytest
import torch

from engine import EngineConfig
from engine.engine import load_runner
from engine.runner import backends
from engine.runner.model_runner import ModelRunner
from engine.weights.model_config import ModelError
from kernels.native import kernel_choices, shared_library
from tests.engine import families
from tests.engine.device_models import write_checkpoint
from tests.engine.small_models import STEPS, VERIFIED, Driver, assert_equal_results, random_tokens
from tests.engine.test_hits_change_nothing import HYBRID

COMPILED = pytest.mark.skipif(shared_library() is None, reason="no C++ compiler")
IS_RECORDED = kernel_choices()["linear_float32"] != "reference"
"""True if decode steps are recorded: all their products are native."""
NATIVE_GROUPS = pytest.mark.skipif(
    kernel_choices()["linear_groups"] == "reference", reason="no native product of four bits"
)
FORMATS = pytest.mark.parametrize(
    "dtype, quantization",
    [("float32", None), ("bfloat16", None), ("bfloat16", "int8"), ("bfloat16", "fp8")],
)


def make_runner(dtype: str = "float32", **options) -> ModelRunner:
    return load_runner(
        EngineConfig(
            device="cpu", dtype=dtype, cache_gib=0.1, max_model_len=512, max_running=8, **options
        )
    )


def decode_logits(runner, prompts, num_steps) -> list[list[torch.Tensor]]:
    """Return the logits of each step in which all prompts decode together."""
    driver = Driver(runner, scatter_seed=3)
    sequences, _ = driver.start(prompts)
    return [list(driver.decode(sequences, [step] * len(prompts))) for step in range(num_steps)]


@pytest.mark.full("float32-None", "bfloat16-int8")
@COMPILED
@FORMATS
def test_batches_and_recording_change_no_bit(dtype, quantization) -> None:
    runner = make_runner(dtype, quantization=quantization)
    assert (runner.graphs.decodes is not None) == IS_RECORDED
    prompts = [random_tokens(length, length) for length in (100, 64, 7)]
    batched = decode_logits(runner, prompts, 3)
    runner.use_graphs("off")
    assert set(runner.graphs) == {None}
    for rank, prompt in enumerate(prompts):
        single = decode_logits(runner, [prompt], 3)
        for step, [logits] in enumerate(single):
            assert torch.equal(logits, batched[step][rank])


@NATIVE_GROUPS
@pytest.mark.full("int4")
@pytest.mark.parametrize("quantization", ["int4", "int4-128"])
def test_recorded_experts_of_four_bits_change_no_bit(quantization, tmp_path) -> None:
    """The router and all experts of a layer are native calls of the recorded step."""
    names = "hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size"
    sizes = dict.fromkeys(names, 128) | {"vocab_size": families.SMALL["vocab_size"]}
    write_checkpoint(tmp_path, HYBRID | sizes | {"mlp_only_layers": []})
    runner = make_runner("bfloat16", model=str(tmp_path), quantization=quantization)
    assert (runner.graphs.decodes is not None) == IS_RECORDED
    prompts = [random_tokens(length, length) for length in (100, 64, 7)]
    recorded = decode_logits(runner, prompts, 3)
    runner.use_graphs("off")
    plain = decode_logits(runner, prompts, 3)
    for first, second in zip(recorded, plain, strict=True):
        assert all(map(torch.equal, first, second))


@pytest.mark.full("float32-None", "bfloat16-int8")
@COMPILED
@FORMATS
def test_recorded_verification_changes_no_bit(dtype, quantization) -> None:
    """A graph is also used for other lengths than those of its recording.

    ``test_verify.py`` compares verification with single steps.
    """
    runner = make_runner(dtype, quantization=quantization, draft="tree:8")
    assert (runner.graphs.verifies is not None) == IS_RECORDED
    driver = Driver(runner, scatter_seed=3)
    recorded = driver.verify(VERIFIED, STEPS)
    driver.reset()
    runner.use_graphs("off")
    assert runner.graphs.verifies is None
    assert_equal_results(driver.verify(VERIFIED, STEPS), recorded)


@COMPILED
@pytest.mark.parametrize("dtype, error", [("float32", 1e-5), ("bfloat16", 0.1)])
def test_logits_are_close_to_the_references(dtype, error) -> None:
    prompts = [random_tokens(90, 1), random_tokens(20, 2)]
    native, plain = (
        torch.stack([torch.stack(step) for step in decode_logits(runner, prompts, 2)])
        for runner in (
            make_runner(dtype),
            make_runner(dtype, kernels=backends.override_all("reference")),
        )
    )
    assert (native - plain).abs().max() < error * plain.float().std()


def test_engine_works_without_a_compiler(monkeypatch) -> None:
    monkeypatch.setattr(backends.native, "shared_library", lambda: None)
    runner = make_runner()
    assert set(runner.kernels.words().values()) == {"reference"}
    [[logits]] = decode_logits(runner, [random_tokens(10, 1)], 1)
    assert logits.isfinite().all()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ModelError, match="kernel gdn cannot be loaded as fused: Triton needs"):
        make_runner(kernels="gdn=fused")
    with pytest.raises(ModelError, match="kernel gdn cannot be loaded as native: no working C"):
        make_runner(kernels="gdn=native")
