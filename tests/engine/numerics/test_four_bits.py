"""4-bit checkpoints of each form: the weights that a model reads are those that the form means."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config

from engine.config import BUILTIN_DIR
from engine.front.command.convert import convert
from engine.models import read_model
from engine.runner.backends import Kernels, override_all
from engine.runner.device import Device
from engine.weights.forms import read_quantization
from engine.weights.model_config import ModelError
from engine.weights.parameters import Build, WeightSpec
from experiments.gpu.models import QWEN3_NEXT_80B
from kernels import native
from kernels.linear.formats import Matrix
from kernels.linear.grouped import Grouped
from tests.engine.numerics import eight_bit
from tests.engine.numerics.conftest import Driver, load, random_tokens

GROUP = 32
Made = tuple[dict[str, torch.Tensor], torch.Tensor]
"""Tensors of a module by the last part of their names, and its weight in float32."""
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def coded(
    weight: torch.Tensor, *, zeros: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes [M, N], scales and zeros [M, G], and the weight that they mean."""
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / 15 if zeros else groups.abs().amax(-1) / 7).to(dtype)
    zero = (-low / scale.float()).round().clamp(1, 15) if zeros else torch.full_like(low, 8)
    codes = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15)
    meant = (codes - zero[..., None]) * scale.float()[..., None]
    return codes.flatten(1).int(), scale, zero.int(), meant.flatten(1)


def words(numbers: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Pack eight numbers of the last dimension into an int32; ``order`` has the number of each
    place."""
    eight = numbers.unflatten(-1, (-1, 8)).long()
    packed = sum(eight[..., number] << 4 * place for place, number in enumerate(order))
    assert isinstance(packed, torch.Tensor)
    return packed.int()  # The highest bit becomes the sign.


def gptq(weight: torch.Tensor, zeros: bool = False) -> Made:
    codes, scale, zero, meant = coded(weight, zeros=zeros, dtype=torch.float16)
    tensors = {
        "qweight": words(codes).T,
        "qzeros": words(zero.T - 1),
        "scales": scale.T,
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }
    return tensors, meant


def awq(weight: torch.Tensor) -> Made:
    codes, scale, zero, meant = coded(weight, zeros=True, dtype=torch.float16)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    packed = {"qweight": words(codes.T, order), "qzeros": words(zero.T, order)}
    return packed | {"scales": scale.T}, meant


def compressed(weight: torch.Tensor, zeros: bool = False) -> Made:
    codes, scale, zero, meant = coded(weight, zeros=zeros, dtype=torch.bfloat16)
    tensors = {
        "weight_packed": words(codes),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    return tensors | ({"weight_zero_point": words(zero.T).T} if zeros else {}), meant


def mxfp4(weight: torch.Tensor) -> Made:
    groups = weight.unflatten(1, (-1, GROUP))
    exponent = (groups.abs().amax(-1) / 6).log2().ceil()
    scaled = groups * (-exponent).exp2()[..., None]
    size = (scaled.abs()[..., None] - E2M1).abs().argmin(-1)
    meant = E2M1[size] * scaled.sign() * exponent.exp2()[..., None]
    low, high = (size + 8 * (scaled < 0)).flatten(1).unflatten(1, (-1, 2)).unbind(-1)
    packed = {"weight_packed": (low + 16 * high).to(torch.uint8)}
    return packed | {"weight_scale": (exponent + 127).to(torch.uint8)}, meant.flatten(1)


def group_of(**weights: Any) -> dict[str, Any]:
    return {"targets": ["Linear"], "weights": {"num_bits": 4, **weights}}


def compressed_section(layout: str, **weights: Any) -> dict[str, Any]:
    group = group_of(strategy="group", group_size=GROUP, **weights)
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
FORMS: dict[str, tuple[Callable[[torch.Tensor], Made], dict[str, Any], str]] = {
    "gptq": (gptq, GPTQ, "GPTQ, int4 in groups of 32"),
    "gptq with zeros": (lambda w: gptq(w, True), GPTQ | {"sym": False}, "GPTQ, int4"),
    "awq": (
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
        "AWQ, int4 in groups of 32",
    ),
    "compressed": (
        compressed,
        compressed_section("pack-quantized", type="int", symmetric=True),
        "int4 in groups of 32",
    ),
    "compressed with zeros": (
        lambda w: compressed(w, True),
        compressed_section("pack-quantized", type="int", symmetric=False),
        "int4 in groups of 32",
    ),
    "mxfp4": (mxfp4, compressed_section("mxfp4-pack-quantized", type="float"), "mxfp4"),
}


def rewrite(path: Path, make: Callable[[torch.Tensor], Made], section: dict[str, Any]) -> Path:
    """Quantise the checkpoint at ``path``. Returns a directory with the weights that it means."""
    stored, meant, left = {}, {}, []
    for name, tensor in eight_bit.split_experts(load_file(path / "model.safetensors")).items():
        module = name.removesuffix(".weight")
        is_whole = tensor.ndim == 2 and not any(size % GROUP for size in tensor.shape)
        if name.endswith(".weight") and eight_bit.QUANTIZED.fullmatch(module) and is_whole:
            tensors, meant[name] = make(tensor)
            stored |= {f"{module}.{word}": part.contiguous() for word, part in tensors.items()}
        else:
            stored[name] = meant[name] = tensor
            left.append(module)
    assert len(stored) > len(meant)
    plain = path.with_name(path.name + "_meant")
    plain.mkdir()
    config = json.loads((path / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config))
    save_file(meant, plain / "model.safetensors")
    save_file(stored, path / "model.safetensors")
    section = section | ({"ignore": left} if "config_groups" in section else {})
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    return plain


@pytest.mark.parametrize("form", FORMS)
def test_forms_mean_their_weights(form, checkpoint):
    """The reference widens weights, so that the logits are equal bit for bit."""
    make, section, said = FORMS[form]
    (path, _), tokens = checkpoint("qwen3_next"), random_tokens(90, seed=3)
    plain = rewrite(path, make, section)
    kernels = {"kernels": "linear=reference,moe=reference"}
    runner = load(path, **kernels)
    assert said in runner.loaded.weights_note
    cold, hit = Driver(runner).cold_and_mixed(tokens)
    expected, _ = Driver(load(plain, **kernels)).cold_and_mixed(tokens)
    assert torch.equal(cold, expected)
    assert torch.equal(hit[1:], cold[64:])


@pytest.mark.parametrize(
    "form, change, match",
    [
        ("gptq", {"bits": 3}, "GPTQ with bits 3 is not supported; supported are"),
        ("gptq", {"group_size": 48}, "group_size 48"),
        ("awq", {"version": "gemv"}, "AWQ with version 'gemv'"),
        ("compressed", {"config_groups": {"a": group_of(strategy="tensor")}}, "strategy 'tensor'"),
        ("gptq", {"group_size": 64}, "scales is .* instead of"),
    ],
)
def test_descriptions_that_are_not_supported_are_named(form, change, match, checkpoint):
    path, _ = checkpoint("qwen3_next")
    make, section, _ = FORMS[form]
    rewrite(path, make, section | change)
    with pytest.raises(ModelError, match=match) as error:
        load(path)
    assert "\n" not in str(error.value)


def test_the_form_of_gpt_oss_is_refused_with_the_supported_ones():
    config = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []}}
    with pytest.raises(ModelError, match=r"form of gpt-oss.*mxfp4-pack-quantized.*GGUF"):
        read_quantization(config)


def test_activation_order_is_refused(checkpoint):
    path, _ = checkpoint("qwen3_next")

    def shuffled(weight: torch.Tensor) -> Made:
        tensors, meant = gptq(weight)
        return tensors | {"g_idx": tensors["g_idx"].flip(0)}, meant

    rewrite(path, shuffled, GPTQ)
    with pytest.raises(ModelError, match=r"the columns of a group are not together .*desc_act"):
        load(path)


@pytest.mark.parametrize("to, group", [("int4", 32), ("int4-128", 128)])
def test_converted_files_have_the_rounded_weights(to, group, checkpoint, tmp_path):
    """Rows that are no whole groups stay in full precision."""
    path, _ = checkpoint("qwen3")
    name = "model.layers.1.mlp.gate_proj.weight"
    config = json.loads((path / "config.json").read_text())
    config |= {"hidden_size": 128, "intermediate_size": 128}
    model = AutoModelForCausalLM.from_config(Qwen3Config(**config))
    model.save_pretrained(path)
    wide = load_file(path / "model.safetensors")
    said = convert(path, tmp_path / "out", to)
    assert f"int4 in groups of {group} columns" in said
    stored = load_file(tmp_path / "out" / "model.safetensors")
    stem, weight = name.removesuffix("weight"), wide[name].float()
    packed = stored[f"{stem}weight_packed"]
    codes = packed[:, :, None] >> torch.arange(0, 32, 4) & 15
    scale = stored[f"{stem}weight_scale"].float().repeat_interleave(group, dim=1)
    meant = (codes.flatten(1).float() - 8) * scale
    largest = weight.abs().unflatten(1, (-1, group)).amax(-1).repeat_interleave(group, dim=1)
    assert ((meant - weight).abs() <= largest / 8 * 1.01).all()
    assert f"int4 in groups of {group}" in load(tmp_path / "out").loaded.weights_note


def test_weights_in_full_precision_are_brought_into_four_bits():
    """The products round activations, so answers differ; hits are exact."""
    if native.kernel_choices()["linear_groups"] == "reference":
        with pytest.raises(ModelError, match=r"--quantization int4 needs a CPU with AVX2"):
            load(BUILTIN_DIR, quantization="int4", cache_gib=0.1)
        return
    tokens = random_tokens(90, seed=3)
    runner = load(BUILTIN_DIR, quantization="int4", cache_gib=0.1)
    assert runner.loaded.weights_note.endswith("; brought into int4")
    cold, hit = Driver(runner).cold_and_mixed(tokens)
    assert torch.equal(hit[1:], cold[64:])
    expected, _ = Driver(load(BUILTIN_DIR, cache_gib=0.1)).cold_and_mixed(tokens)
    assert 1e-3 < (cold - expected).norm() / expected.norm() < 0.3


@pytest.mark.parametrize("group, expected_gib", [(128, 39.2), (32, 42.65)])
def test_an_80b_model_in_four_bits_fits_a_device_of_48_gib(group, expected_gib):
    """By the tensors of its layers, none of which is allocated. Products on a device keep the
    sizes of the files."""
    pytest.importorskip("triton")
    from kernels.linear.words import words_of

    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group}
    described = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*shared_expert_gate$", "re:.*in_proj_ba$"],
        "config_groups": {"all": {"targets": ["Linear"], "weights": weights}},
    }

    def num_bytes(num_layers: int) -> int:
        raw = QWEN3_NEXT_80B | {"quantization_config": described, "num_hidden_layers": num_layers}
        family, config = read_model(raw)
        kernels, files = (
            Kernels(Device.resolve("cpu"), override_all("fused")),
            read_quantization(raw),
        )
        nowhere, linear = torch.device("meta"), kernels["linear"]
        spec = WeightSpec(nowhere, torch.bfloat16, None, files, lambda f: f.has_product(linear))
        targets = [one.target for _, one in family(config, Build(kernels, spec)).parameters()]
        return sum(t.num_bytes if isinstance(t, Matrix) else t.nbytes for t in targets)

    four, eight = num_bytes(4), num_bytes(8)  # Layers repeat after four.
    assert (four + 11 * (eight - four)) / 2**30 == pytest.approx(expected_gib, abs=0.01)
    format, stored = Grouped(4, group), Matrix.empty(Grouped(4, group), (8, 512), torch.empty)
    in_words = words_of(format, stored.fields)
    assert sum(table.nbytes for table in in_words if table is not None) == stored.num_bytes
