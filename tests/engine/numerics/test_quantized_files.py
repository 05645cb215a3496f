"""8-bit checkpoints: each supported layout equals its dequantised weights, each fault is named in
one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.front.command.convert import convert
from engine.runner.backends import Kernels
from engine.runner.device import Device
from engine.weights.checkpoint import WeightFiles
from engine.weights.forms import read_quantization
from engine.weights.model_config import ModelError
from engine.weights.parameters import Build, Source, WeightSpec
from engine.weights.products import Linear, Part
from experiments.gpu import interpreter
from kernels.linear.formats import Matrix
from tests.engine.numerics import eight_bit
from tests.engine.numerics.conftest import Driver, load, random_tokens

BLOCK = (16, 48)
"""Small blocks: head boundaries cut them, and the last ones are partial."""


def fp8(path, scale_dtype=torch.bfloat16, block=BLOCK, **options):
    code = partial(eight_bit.fp8_blocks, block=block, scale_dtype=scale_dtype)
    section = partial(eight_bit.fp8_section, block=block)
    return eight_bit.rewrite(path, code, "weight_scale_inv", section, **options)


def int8(path, section=eight_bit.compressed_section, **options):
    code = partial(eight_bit.channels, dtype=torch.int8)
    return eight_bit.rewrite(path, code, "weight_scale", section, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "published, prefix, scale_dtype",
    [
        ("qwen3_next", "model.", torch.bfloat16),
        ("qwen3_5", "model.language_model.", torch.bfloat16),
        ("qwen3_5_moe", "model.language_model.", torch.float32),
    ],
)
def test_fp8_blocks_equal_their_dequantised_weights(
    published, prefix, scale_dtype, dtype, checkpoint
):
    """The layouts are those of Qwen3-Next-FP8 and Qwen3.5-FP8.

    A CPU widens the weights, so the logits are equal bit for bit. Queries, keys and gates are
    reordered within and across blocks.
    """
    (path, _), tokens = checkpoint(published), random_tokens(90, seed=3)
    plain = fp8(path, scale_dtype, prefix=prefix)
    runner = load(path, dtype=dtype)
    assert f"fp8 in blocks of 16 x 48, widened to {dtype}" in runner.loaded.weights_note
    cold, hit = Driver(runner).cold_and_mixed(tokens)
    expected, _ = Driver(load(plain, dtype=dtype)).cold_and_mixed(tokens)
    assert torch.equal(cold, expected)
    assert torch.equal(hit[1:], cold[64:])


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_int8_weights_stay_int8_and_hits_are_exact(prefix, checkpoint):
    """Activations are rounded per token or not at all, so the test uses a bound."""
    (path, _), tokens = checkpoint("qwen3_next"), random_tokens(90, seed=4)
    ignore = ["lm_head", r"re:.*in_proj_ba$", r"re:.*mlp\.gate$", "re:.*shared_expert_gate$"]
    plain = int8(path, lambda _: eight_bit.compressed_section(ignore), prefix=prefix)
    runner = load(path)
    assert (
        "int8 with a scale per output channel, multiplied as they are" in runner.loaded.weights_note
    )
    cold, hit = Driver(runner).cold_and_mixed(tokens)
    expected, _ = Driver(load(plain)).cold_and_mixed(tokens)
    assert (cold - expected).norm() < 0.05 * expected.norm()
    assert torch.equal(hit[1:], cold[64:])
    as_model_slim(path)
    assert torch.equal(Driver(load(path)).cold_and_mixed(tokens)[0], cold)
    with pytest.raises(ModelError, match="is already int8"):
        convert(path, path.with_name("again"), "int8")


def as_model_slim(path):
    """Describe an int8 checkpoint by ModelSlim's file, with its zero points."""
    tensors = load_file(path / "model.safetensors")
    scales = {name: scale for name, scale in tensors.items() if name.endswith(".weight_scale")}
    offsets = {name.replace("_scale", "_offset"): torch.zeros_like(s) for name, s in scales.items()}
    kinds = dict.fromkeys(tensors, "FLOAT") | {
        name.removesuffix("_scale"): "W8A8_DYNAMIC" for name in scales
    }
    save_file(tensors | offsets, path / "model.safetensors")
    (path / "quant_model_description.json").write_text(json.dumps(kinds))
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))


def test_fp8_blocks_in_a_layer_on_a_device(tmp_path):
    """Triton multiplies blocks of 128 x 128 directly; reordered rows keep their scales."""
    pytest.importorskip("kernels.linear.fused")
    interpreter.repair()
    kernels = Kernels(Device.resolve("cpu"), "linear=fused")
    device, dtype = torch.device("cpu"), torch.float32
    parts = [
        Part("m.in_proj_qkvz", 330, torch.randperm(330)),
        Part("m.in_proj_z", 100),
        Part("m.in_proj_ba", 12, torch.randperm(12)),
    ]
    plain = Linear(200, parts, Build(kernels, WeightSpec(device, dtype)))
    stored = {}
    for name, parameter in plain.parameters():
        module = name.removesuffix(".weight")
        stored[name] = weight = torch.randn(parameter.target.shape)
        if not eight_bit.QUANTIZED.fullmatch(module):
            parameter.fill(Source.of(weight))
            continue
        stored[name], scale, widened = eight_bit.fp8_blocks(weight, (128, 128), torch.bfloat16)
        stored[f"{module}.weight_scale_inv"] = scale
        parameter.fill(Source.of(widened))
    save_file(stored, tmp_path / "model.safetensors")
    config = {"quantization_config": eight_bit.fp8_section(["m.in_proj_ba"])}
    files = read_quantization(config)
    others = read_quantization({"quantization_config": eight_bit.fp8_section([])})
    assert [others.format(name) is None for name in ("m.lm_head", "m.in_proj_ba")] == [True, False]
    linear = kernels["linear"]
    place = WeightSpec(device, dtype, files=files, multiplies=lambda one: one.has_product(linear))
    dynamic = place.files.format("m.in_proj_z")
    assert place.product_options(dynamic) == {}
    assert replace(place, follows_files=True).product_options(dynamic) == {"fp8_rows": True}
    weights_only = replace(dynamic, keeps_inputs=True)
    assert replace(place, follows_files=True).product_options(weights_only) == {}
    quantised, rounding = (
        Linear(200, parts, Build(kernels, replace(place, fp8_activations=rounds)))
        for rounds in (False, True)
    )
    for layer in (quantised, rounding):
        weight_files = WeightFiles(tmp_path, config)
        weight_files.check(layer.parameters(), tied=False)
        weight_files.fill(layer)
    targets = [parameter.target for _, parameter in quantised.parameters()]
    stored = {one.format.kind if isinstance(one, Matrix) else one.dtype for one in targets}
    assert stored == {"fp8", torch.float32}
    hidden = torch.randn(5, 200)
    for layer in (quantised, rounding, plain):
        layer.seal()
    expected = plain(hidden)
    torch.testing.assert_close(quantised(hidden), expected, rtol=1e-4, atol=1e-4)
    error = (rounding(hidden) - expected)[:, :430].norm() / expected[:, :430].norm()
    assert 1e-3 < error < 0.04
    assert torch.equal(rounding(hidden)[:, 430:], quantised(hidden)[:, 430:])


@pytest.mark.full
@pytest.mark.parametrize(
    "published, prefix",
    [("qwen3_next", "model."), ("qwen3_5_moe", "model.language_model.")],
)
def test_fp8_files_on_a_device_equal_their_dequantised_weights(published, prefix, checkpoint):
    """Triton multiplies blocks of 128 x 128, of reordered rows and of experts. Scales are different
    powers of two, which do not round, so that all bits are equal."""
    pytest.importorskip("kernels.linear.fused")
    interpreter.repair()
    scales = set()

    def code(weight):
        scale = torch.empty(tuple(-(-size // 128) for size in weight.shape))
        for rank in range(scale.numel()):
            scale.view(-1)[rank] = 2.0 ** ((7 * rank + len(scales)) % 5 - 9)
        scales.update(scale.flatten().tolist())
        each = scale.repeat_interleave(128, 0)[: len(weight)].repeat_interleave(128, 1)
        each = each[:, : weight.shape[1]]
        stored = (weight / each).to(torch.float8_e4m3fn)
        return stored, scale.bfloat16(), stored.float() * each

    path, _ = checkpoint(published)
    plain = eight_bit.rewrite(path, code, "weight_scale_inv", eight_bit.fp8_section, prefix=prefix)
    options = {"dtype": "bfloat16", "kernels": "linear=fused,moe=fused"}
    runner = load(path, **options)
    assert "fp8 in blocks of 128 x 128, multiplied as they are" in runner.loaded.weights_note
    tokens = random_tokens(5, seed=3)
    found, expected = (
        Driver(one).cold(tokens, all_logits=True) for one in (runner, load(plain, **options))
    )
    assert torch.equal(found, expected) and len(scales) == 5


COMPRESSED = eight_bit.compressed_section(["lm_head"])


@pytest.mark.parametrize(
    "section, message",
    [
        ({"quant_method": "hqq"}, "hqq weights are not supported; supported are .*fp8 in blocks"),
        *(({"quant_method": name}, name) for name in ("bitsandbytes", "gguf")),
        ({"quant_method": "gptq", "bits": 4}, "lacks a value, .*group_size"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt weights"),
        ({"bits": 3}, "unnamed weights"),
        (5, "quantization_config in config.json must be an object"),
        ({"quant_method": "fp8"}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [0]}, "two positive integers"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "activation_scheme 'static'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "e5m2"),
        (
            eight_bit.compressed_section([], weights={"num_bits": 4}),
            "group_0 of .* with num_bits 4",
        ),
        ({**COMPRESSED, "format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
        (eight_bit.compressed_section([], weights={"symmetric": False}), "symmetric False"),
        (eight_bit.compressed_section([], weights={"strategy": "group"}), "strategy 'group'"),
        ({**COMPRESSED, "config_groups": {}}, "config_groups"),
        ({**COMPRESSED, "config_groups": {"a": 5}}, "wrong type"),
        ({**COMPRESSED, "ignore": ["re:("]}, "is not a regular expression"),
    ],
)
def test_unsupported_quantization_is_named(section, message):
    with pytest.raises(ModelError, match=f"(?i){message}") as error:
        read_quantization({"quantization_config": section})
    assert "\n" not in str(error.value)


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "change, match",
    [
        (
            lambda tensors, _: tensors.update({f"{UP}_scale_inv": torch.ones(3, 3)}),
            r"layers\.1\.mlp\.up_proj\.weight_scale_inv is \[3, 3\] instead of \[6, 2\]",
        ),
        (
            lambda tensors, _: tensors.pop(f"{UP}_scale_inv"),
            "1 missing: .*up_proj.weight_scale_inv",
        ),
        (
            lambda tensors, _: tensors[f"{UP}_scale_inv"].fill_(float("nan")),
            "up_proj.weight_scale_inv contains NaN",
        ),
        (
            lambda tensors, _: tensors.update({UP: tensors[UP].float()}),
            r"does not give: model\.layers\.1\.mlp\.up_proj\.weight is float32",
        ),
        (
            lambda _, section: section["modules_to_not_convert"].append(UP.removesuffix(".weight")),
            r"does not give: .*up_proj.weight is float8_e4m3fn",
        ),
    ],
)
def test_files_that_differ_from_their_config_are_refused(change, match, checkpoint):
    path, _ = checkpoint("qwen3")
    fp8(path)
    tensors = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=match) as error:
        load(path)
    assert "\n" not in str(error.value)
