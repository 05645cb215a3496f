"""Quantised checkpoints: files of each form have the weights that the form means, in the model and
alone; each fault is named in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config

from engine.config import BUILTIN_DIR
from engine.front.command.convert import convert
from engine.models import read_model
from engine.runner.backends import Kernels, override_all
from engine.runner.device import Device
from engine.weights.checkpoint import WeightFiles
from engine.weights.forms import read_quantization
from engine.weights.model_config import ModelError
from engine.weights.parameters import Build, Parameter, Source, WeightSpec
from engine.weights.products import Linear, Part
from kernels import native
from kernels.linear.formats import Matrix
from kernels.linear.grouped import Grouped
from tests.engine.device_models import QWEN3_NEXT_80B
from tests.engine.small_models import Driver, load, random_tokens
from tests.engine.weights import checkpoints
from tests.engine.weights.checkpoints import (
    GROUP,
    Made,
    Section,
    Tensors,
    compressed_section,
    fp8_blocks,
    fp8_section,
    rewrite,
)
from tests.kernels import interpreter
from tests.refused import refused

# --- Models ---------------------------------------------------------------------------------------

BLOCK = (16, 48)
"""Small blocks: head boundaries cut them, and the last ones are partial."""


def fp8(path: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    return rewrite(
        path,
        lambda weight: fp8_blocks(weight, BLOCK, dtype),
        lambda exceptions: fp8_section(exceptions, BLOCK),
        **options,
    )


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
    section = compressed_section(ignore)
    plain = rewrite(path, checkpoints.int8_channels, lambda _: section, prefix=prefix)
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
    refused("is already int8", convert, path, path.with_name("again"), "int8", kind=ModelError)


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
        if not checkpoints.QUANTIZED.fullmatch(module):
            parameter.fill(Source.of(weight))
            continue
        made, widened = fp8_blocks(weight)
        stored |= {f"{module}.{word}": part for word, part in made.items()}
        parameter.fill(Source.of(widened))
    save_file(stored, tmp_path / "model.safetensors")
    config = {"quantization_config": fp8_section(["m.in_proj_ba"])}
    files = read_quantization(config)
    others = read_quantization({"quantization_config": fp8_section([])})
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
    "published, prefix", [("qwen3_next", "model."), ("qwen3_5_moe", "model.language_model.")]
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
        return {"weight": stored, "weight_scale_inv": scale.bfloat16()}, stored.float() * each

    path, _ = checkpoint(published)
    plain = rewrite(path, code, fp8_section, prefix=prefix)
    options = {"dtype": "bfloat16", "kernels": "linear=fused,moe=fused"}
    runner = load(path, **options)
    assert "fp8 in blocks of 128 x 128, multiplied as they are" in runner.loaded.weights_note
    tokens = random_tokens(5, seed=3)
    found, expected = (
        Driver(one).cold(tokens, all_logits=True) for one in (runner, load(plain, **options))
    )
    assert torch.equal(found, expected) and len(scales) == 5


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}


def packed(**weights: Any) -> Callable[[list[str]], Section]:
    return lambda left: compressed_section(left, "pack-quantized", type="int", **weights)


def mxfp4_section(left: list[str]) -> Section:
    return compressed_section(left, "mxfp4-pack-quantized", type="float")


FORMS: dict[str, tuple[Callable[..., Made], Callable[[list[str]], Section], str]] = {
    "gptq": (checkpoints.gptq, lambda _: GPTQ, "GPTQ, int4 in groups of 32"),
    "gptq with zeros": (
        lambda w: checkpoints.gptq(w, True),
        lambda _: GPTQ | {"sym": False},
        "GPTQ, int4",
    ),
    "awq": (checkpoints.awq, lambda _: AWQ, "AWQ, int4 in groups of 32"),
    "compressed": (checkpoints.compressed, packed(symmetric=True), "int4 in groups of 32"),
    "compressed with zeros": (
        lambda w: checkpoints.compressed(w, True),
        packed(symmetric=False),
        "int4 in groups of 32",
    ),
    "compressed with a smaller last group": (  # Rows of 32, 64, 96 or 160 columns.
        lambda w: checkpoints.compressed(w, group=64),
        packed(symmetric=True, group_size=64),
        "int4 in groups of 64",
    ),
    "mxfp4": (checkpoints.mxfp4, mxfp4_section, "mxfp4"),
}


@pytest.mark.full("gptq with zeros", "awq", "compressed with a smaller last group", "mxfp4")
@pytest.mark.parametrize("form", FORMS)
def test_forms_mean_their_weights(form, checkpoint):
    """The reference widens weights, so that the logits are equal bit for bit."""
    make, section, said = FORMS[form]
    (path, _), tokens = checkpoint("qwen3_next"), random_tokens(90, seed=3)
    plain = rewrite(path, make, section, group=GROUP)
    kernels = {"kernels": "linear=reference,moe=reference"}
    runner = load(path, **kernels)
    assert said in runner.loaded.weights_note
    cold, hit = Driver(runner).cold_and_mixed(tokens)
    expected, _ = Driver(load(plain, **kernels)).cold_and_mixed(tokens)
    assert torch.equal(cold, expected)
    assert torch.equal(hit[1:], cold[64:])


def test_stacked_experts_are_in_full_precision_beside_few_bits(checkpoint):
    """A stack is no linear layer, whether or not the section excludes it."""

    def section(left: list[str]) -> Section:
        return mxfp4_section([one for one in left if not one.endswith("moe.output_linear")])

    (path, _), tokens = checkpoint("granite_moe_hybrid"), random_tokens(9, seed=3)
    plain = rewrite(path, checkpoints.mxfp4, section, group=GROUP)
    found, expected = (Driver(load(one)).cold(tokens) for one in (path, plain))
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()  # Products round inputs.


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
    # bfloat16 rounds a scale by at most 2**-8. The largest error is that of a number just below the
    # largest, of the other sign: it is 8 scales and the last code is 7.
    assert stored[f"{stem}weight_scale"].dtype == torch.bfloat16
    assert ((meant - weight).abs() <= largest / 8 * (1 + 7 * 2**-8)).all()
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


# --- Refusals ------------------------------------------------------------------------------------

COMPRESSED = compressed_section(["lm_head"])
MXFP4 = "mxfp4-pack-quantized"


@pytest.mark.parametrize(
    "section, message",
    [
        ({"quant_method": "hqq"}, "hqq weights are not supported; supported are .*fp8 in blocks"),
        *(({"quant_method": name}, f"^{name} weights") for name in ("bitsandbytes", "gguf")),
        ({"quant_method": "gptq", "bits": 4}, "lacks a value, .*group_size"),
        (GPTQ | {"bits": 3}, "GPTQ with bits 3 is not supported; supported are"),
        (GPTQ | {"group_size": 48}, "group_size 48"),
        (GPTQ | {"checkpoint_format": "gptq", "format": "gptq_v2"}, "and format in .* differ"),
        (AWQ | {"version": "gemv"}, "AWQ with version 'gemv'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt weights"),
        ({"bits": 3}, "unnamed weights"),
        (5, "quantization_config in config.json must be an object"),
        ({"quant_method": "fp8"}, "weight_block_size"),
        (
            {"quant_method": "fp8", "weight_block_size": [0]},
            "weight_block_size must be two positive",
        ),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "activation_scheme 'static'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "e5m2"),
        (compressed_section([], num_bits=4), "group_0 of .* with num_bits 4"),
        (packed(strategy="tensor")([]), "strategy 'tensor'"),
        ({**COMPRESSED, "format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
        (compressed_section([], symmetric=False), "symmetric False"),
        (compressed_section([], strategy="group"), "strategy 'group'"),
        (compressed_section([], strategy="block"), "block_structure of group_0 of .* two positive"),
        (compressed_section([], MXFP4, type="float", num_bits=8), "weights with num_bits 8"),
        ({**COMPRESSED, "config_groups": {}}, "config_groups"),
        ({**COMPRESSED, "config_groups": {"a": 5}}, "wrong type"),
        ({**COMPRESSED, "ignore": ["re:("]}, "is not a regular expression"),
        (
            {"quant_method": "mxfp4", "modules_to_not_convert": []},
            "form of gpt-oss.*mxfp4-pack-quantized.*GGUF",
        ),
        # Up to 0.13 exponents were stored less 2: all weights would be a quarter of their size.
        *(
            (
                mxfp4_section([]) | {"version": version},
                f"{MXFP4} with version {version or 'missing'}",
            )
            for version in ("0.12.2", "0.13.0", "0.13.1.a20260105", "dev", "", None)
        ),
    ],
)
def test_unsupported_quantization_is_named(section, message):
    with pytest.raises(ModelError, match=f"(?i){message}") as error:
        read_quantization({"quantization_config": section})
    assert "\n" not in str(error.value)


UP = "model.layers.1.mlp.up_proj"


def widen(tensors: Tensors, section: Section) -> None:
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].float()


def mix(tensors: Tensors, section: Section) -> None:
    tensors[f"{UP}.g_idx"] = tensors[f"{UP}.g_idx"].flip(0)


def as_second_version(sym: bool | None, tensors: Tensors, section: Section) -> None:
    """Store zero points as in ``gptq_v2``."""
    for name in tensors:
        if name.endswith(".qzeros"):
            tensors[name] = tensors[name] + 0x11111111
    section.pop("sym")
    section |= {} if sym is None else {"sym": sym}


@pytest.mark.parametrize(
    "form, change, match",
    [
        (
            "fp8",
            lambda tensors, _: tensors.update({f"{UP}.weight_scale_inv": torch.ones(3, 3)}),
            r"layers\.1\.mlp\.up_proj\.weight_scale_inv is \[3, 3\] instead of \[6, 2\]",
        ),
        (
            "fp8",
            lambda tensors, _: tensors.pop(f"{UP}.weight_scale_inv"),
            "1 missing: .*up_proj.weight_scale_inv",
        ),
        (
            "fp8",
            lambda tensors, _: tensors[f"{UP}.weight_scale_inv"].fill_(float("nan")),
            "up_proj.weight_scale_inv contains NaN",
        ),
        ("fp8", widen, r"does not give: model\.layers\.1\.mlp\.up_proj\.weight is float32"),
        (
            "fp8",
            lambda _, section: section["modules_to_not_convert"].append(UP),
            r"does not give: .*up_proj.weight is float8_e4m3fn",
        ),
        (
            "gptq",
            lambda _, section: section.update(group_size=64),
            r"of the wrong shape \(use the config of these files, or correct its bits and "
            r"group_size\): .*scales is .* instead of",
        ),
        (
            "gptq with zeros",
            lambda _, section: section.update(sym=True),
            "zero points than 8 in checkpoint_format gptq: ",
        ),
        *(
            ("gptq", partial(as_second_version, sym), f"^sym .* is {said}, .* than 8 .* gptq: ")
            for sym, said in ((True, "true"), (False, "false"), (None, "missing"))
        ),
        ("gptq", lambda _, section: section.update(bits=8), "correct its bits and group_size"),
        (
            "gptq with zeros",
            lambda tensors, _: tensors[f"{UP}.qzeros"].fill_(-1),
            "qzeros that checkpoint_format gptq cannot store",
        ),
        ("gptq", mix, r"groups whose columns are not together .*desc_act"),
    ],
)
def test_files_that_differ_from_their_config_are_refused(form, change, match, checkpoint):
    path, _ = checkpoint("qwen3")
    if form == "fp8":
        fp8(path)
    else:
        make, section, _ = FORMS[form]
        rewrite(path, make, section, group=GROUP)
    tensors = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=match) as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, form", [("quantize_config.json", "gptq"), ("quant_config.json", "awq")]
)
def test_a_description_beside_the_config_is_read(name, form, checkpoint):
    """As AutoGPTQ and AutoAWQ wrote it. Without it, quantised weights are refused."""
    path, _ = checkpoint("qwen3_next")
    make, section, said = FORMS[form]
    rewrite(path, make, section, group=GROUP)
    config = json.loads((path / "config.json").read_text())
    own = {
        key: value for key, value in config.pop("quantization_config").items() if "_m" not in key
    }
    if form == "awq":
        own = {"zero_point": True, "q_group_size": GROUP, "w_bit": 4, "version": "GEMM"}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"qweight is of a quantised model.*quantize_config.json"):
        WeightFiles(path, config)
    (path / name).write_text(json.dumps(own))
    found = WeightFiles(path, config).formats
    assert found is not None and said in found.describe()
    (path / name).write_text(json.dumps({"bits": 4}))
    refused(f"{name} lacks a value|group_size None", WeightFiles, path, config, kind=ModelError)


def test_dynamic_gives_modules_their_own_bits(tmp_path):
    """Some have 8 bits; excluded modules have plain weights."""
    stored, meant = {}, {}
    for module, bits in (("a.q_proj", 4), ("a.k_proj", 8)):
        codes, zeros = torch.randint(2**bits, (16, 64)), torch.full((2, 16), 2 ** (bits - 1))
        scale = torch.rand(2, 16).half()
        stored |= {
            f"{module}.qweight": checkpoints.words(codes, bits=bits).T.contiguous(),
            f"{module}.qzeros": checkpoints.words(zeros - 1, bits=bits),
            f"{module}.scales": scale,
        }
        each = scale.float().T.repeat_interleave(GROUP, 1)
        meant[module] = (codes - 2 ** (bits - 1)).float() * each
    stored["a.v_proj.weight"] = meant["a.v_proj"] = torch.rand(16, 64)
    save_file(stored, tmp_path / "model.safetensors")
    dynamic = {"+:.*k_proj": {"bits": 8}, "-:.*v_proj": {}}
    files = WeightFiles(tmp_path, {"quantization_config": GPTQ | {"dynamic": dynamic}})
    targets = {f"{module}.weight": Parameter(torch.empty(16, 64)) for module in meant}
    files.check(targets.items(), tied=False)
    for module, expected in meant.items():
        found = files.source(f"{module}.weight", (16, 64)).read().widened(torch.float32)
        torch.testing.assert_close(found, expected)
    for rule, match in (({"-:.*k_proj": {}}, "excludes a.k_proj"), ({".*": {"bits": 3}}, "bits 3")):
        with pytest.raises(ModelError, match=match):
            WeightFiles(tmp_path, {"quantization_config": GPTQ | {"dynamic": rule}})


# --- Sections that do not describe their tensors --------------------------------------------------

ROWS, COLUMNS = 16, 160
"""Size of a random weight, whose last group of 64 or 128 columns is partial."""


def numbers_of(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the first ``count`` numbers of the words in the last dimension, lowest bits first."""
    shifts = torch.arange(0, 32, bits)
    return (packed.long()[..., None] >> shifts & 2**bits - 1).flatten(-2)[..., :count]


def gptq_meant(section: Section, stored: Tensors) -> torch.Tensor | None:
    """Return the weight by the formula of AutoGPTQ and GPTQModel, or None if shapes differ from the
    section, or if their readers differ."""
    bits, size = section["bits"], section["group_size"]
    group = COLUMNS if size == -1 else size
    num_words, num_groups = -(-COLUMNS * bits // 32), -(-COLUMNS // group)
    shapes = [tuple(stored[name].shape) for name in ("qweight", "qzeros", "scales")]
    if shapes != [(num_words, ROWS), (num_groups, ROWS * bits // 32), (num_groups, ROWS)]:
        return None
    codes = numbers_of(stored["qweight"].T, bits, COLUMNS).T
    zeros = numbers_of(stored["qzeros"], bits, ROWS)
    if section.get("checkpoint_format") != "gptq_v2":
        if (zeros == 2**bits - 1).any():
            return None
        zeros = zeros + 1
    if section.get("sym") and (zeros != 2 ** (bits - 1)).any():  # Kernels for sym do not read them.
        return None
    place = stored.get("g_idx", torch.arange(COLUMNS) // group).long()
    return ((codes - zeros[place]) * stored["scales"].float()[place]).T


def awq_meant(section: Section, stored: Tensors) -> torch.Tensor | None:
    num_groups = -(-COLUMNS // section["group_size"])
    shapes = [tuple(stored[name].shape) for name in ("qweight", "qzeros", "scales")]
    if shapes != [(COLUMNS, ROWS // 8), (num_groups, ROWS // 8), (num_groups, ROWS)]:
        return None
    place_of = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # Numbers 0, 2, 4, 6, 1, ... in a word.
    codes, zeros = (
        numbers_of(stored[name], 4, ROWS).unflatten(-1, (-1, 8))[..., place_of].flatten(-2)
        for name in ("qweight", "qzeros")
    )
    place = torch.arange(COLUMNS) // section["group_size"]
    return ((codes - zeros[place]) * stored["scales"].float()[place]).T


def compressed_meant(section: Section, stored: Tensors) -> torch.Tensor | None:
    weights = section["config_groups"]["group_0"]["weights"]
    bits, count = weights["num_bits"], int(stored["weight_shape"][1])
    group = count if weights["strategy"] == "channel" else weights["group_size"]
    zeros, num_groups = stored.get("weight_zero_point"), -(-count // group)
    shapes = tuple(stored["weight_packed"].shape), tuple(stored["weight_scale"].shape)
    if shapes != ((ROWS, -(-count * bits // 32)), (ROWS, num_groups)):
        return None
    if (zeros is None) != weights["symmetric"] or (weights["actorder"] == "group") != (
        "weight_g_idx" in stored
    ):
        return None
    codes = numbers_of(stored["weight_packed"], bits, count)
    middle = torch.full((ROWS, num_groups), 2 ** (bits - 1))
    if zeros is not None:
        if tuple(zeros.shape) != (ROWS * bits // 32, num_groups):
            return None
        middle = numbers_of(zeros.T, bits, ROWS).T
    place = torch.arange(count) // group
    return (codes - middle[:, place]) * stored["weight_scale"].float()[:, place]


def mxfp4_meant(section: Section, stored: Tensors) -> torch.Tensor | None:
    """Return the weight by the OCP's formula, or None for a version that stored less exponents."""
    exponents = stored["weight_scale"].view(torch.uint8).int() - 127
    if section["version"] < "0.14" or (exponents == 128).any():
        return None
    packed = stored["weight_packed"].view(torch.uint8).int()
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    signs = 1 - 2 * (codes >> 3)
    each = exponents.double().exp2().repeat_interleave(32, dim=1)
    return (checkpoints.E2M1[codes & 7] * signs * each).float()


def eight_meant(section: Section, stored: Tensors) -> torch.Tensor | None:
    """Return the weight in 8 bits of compressed-tensors, with a scale per channel, tensor or block.
    Zero points must be 0, as those of symmetric weights."""
    weights = section["config_groups"]["group_0"]["weights"]
    dtype = torch.int8 if weights["type"] == "int" else torch.float8_e4m3fn
    rows, columns = {"channel": (1, COLUMNS), "tensor": (ROWS, COLUMNS)}.get(
        weights["strategy"], tuple(weights["block_structure"])
    )
    shape = (-(-ROWS // rows), -(-COLUMNS // columns))
    if stored["weight"].dtype is not dtype or stored["weight_scale"].shape != shape:
        return None
    if "weight_zero_point" in stored and stored["weight_zero_point"].any():
        return None
    scale = stored["weight_scale"].float().repeat_interleave(rows, 0)[:ROWS]
    return stored["weight"].float() * scale.repeat_interleave(columns, 1)[:, :COLUMNS]


def fp8_meant(section: Section, stored: Tensors) -> torch.Tensor | None:
    rows, columns = section["weight_block_size"]
    if stored["weight_scale_inv"].shape != (-(-ROWS // rows), -(-COLUMNS // columns)):
        return None
    scale = stored["weight_scale_inv"]
    scale = (scale.float() - 127).exp2() if scale.dtype is torch.uint8 else scale.float()
    scale = scale.repeat_interleave(rows, 0)[:ROWS]
    return stored["weight"].float() * scale.repeat_interleave(columns, 1)[:, :COLUMNS]


def drawn(draw: st.DrawFn) -> Callable[..., torch.Tensor]:
    """Return a function that draws integers from ``low`` to below ``high`` by a drawn seed."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return lambda low, high, *shape: torch.randint(low, high, shape, generator=generator)


@st.composite
def gptq_files(draw: st.DrawFn) -> tuple[Section, Tensors]:
    numbers, bits = drawn(draw), draw(st.sampled_from([4, 8]))
    size = draw(st.sampled_from([-1, 32, 64, 128]))
    group = COLUMNS if size == -1 else size
    num_groups, middle = -(-COLUMNS // group), 2 ** (bits - 1)
    first, is_symmetric = draw(st.sampled_from([0, 1])), draw(st.booleans())
    zeros = numbers(first, 2**bits, num_groups, ROWS)
    zeros = torch.full_like(zeros, middle) if is_symmetric else zeros
    stored = {
        "qweight": checkpoints.words(numbers(0, 2**bits, ROWS, COLUMNS), bits=bits).T,
        "qzeros": checkpoints.words(zeros - first, bits=bits),
        "scales": numbers(-99, 99, num_groups, ROWS).half() / 64,
    }
    if draw(st.booleans()):
        stored["g_idx"] = (torch.arange(COLUMNS) // group).int()
    section: Section = {"quant_method": "gptq", "bits": bits, "group_size": size}
    section["sym"] = draw(st.sampled_from([is_symmetric, is_symmetric, not is_symmetric]))
    form = ["gptq_v2", "gptq"][first]
    section["checkpoint_format"] = draw(st.sampled_from([form, form, "gptq", "gptq_v2"]))
    if draw(st.booleans()):
        section |= draw(st.sampled_from([{"bits": 12 - bits}, {"group_size": 32}]))
    return section, stored


@st.composite
def awq_files(draw: st.DrawFn) -> tuple[Section, Tensors]:
    numbers, size = drawn(draw), draw(st.sampled_from([32, 64, 128]))
    num_groups, order = -(-COLUMNS // size), (0, 2, 4, 6, 1, 3, 5, 7)
    stored = {
        "qweight": checkpoints.words(numbers(0, 16, COLUMNS, ROWS), order),
        "qzeros": checkpoints.words(numbers(0, 16, num_groups, ROWS), order),
        "scales": numbers(-99, 99, num_groups, ROWS).half() / 64,
    }
    said = draw(st.sampled_from([size, size, 32, 64]))
    return {"quant_method": "awq", "bits": 4, "group_size": said, "version": "gemm"}, stored


@st.composite
def compressed_files(draw: st.DrawFn) -> tuple[Section, Tensors]:
    numbers, bits = drawn(draw), draw(st.sampled_from([4, 8]))
    size, count = draw(st.sampled_from([None, 32, 64, 128])), draw(st.sampled_from([20, 160, 300]))
    num_groups = -(-count // (size or count))
    stored = {
        "weight_packed": checkpoints.words(numbers(0, 2**bits, ROWS, count), bits=bits),
        "weight_scale": numbers(-99, 99, ROWS, num_groups).bfloat16() / 64,
        "weight_shape": torch.tensor([ROWS, count]),
    }
    has_zeros, has_order = draw(st.booleans()), draw(st.booleans())
    if has_zeros:
        stored["weight_zero_point"] = checkpoints.words(
            numbers(0, 2**bits, num_groups, ROWS), bits=bits
        ).T
    if has_order:
        stored["weight_g_idx"] = torch.arange(count) // (size or count)
    weights = {
        "type": "int",
        "num_bits": draw(st.sampled_from([bits, bits, 4])),
        "strategy": "group" if size else "channel",
        "group_size": draw(st.sampled_from([size, size, 32])),
        "symmetric": draw(st.sampled_from([not has_zeros, not has_zeros, has_zeros])),
        "actorder": draw(st.sampled_from(["group" if has_order else None, "group", None])),
    }
    if has_order and weights["actorder"] is None:
        del stored["weight_g_idx"]
    group = {"targets": ["Linear"], "weights": weights}
    section = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    return section | {"config_groups": {"group_0": group}}, stored


@st.composite
def mxfp4_files(draw: st.DrawFn) -> tuple[Section, Tensors]:
    numbers, top = drawn(draw), draw(st.sampled_from([130, 256]))
    kinds = torch.uint8, torch.int8, torch.float8_e8m0fnu
    packed, scale = draw(st.sampled_from(kinds[:2])), draw(st.sampled_from(kinds))
    stored = {
        "weight_packed": numbers(0, 256, ROWS, COLUMNS // 2).byte().view(packed),
        "weight_scale": numbers(top - 6, top, ROWS, COLUMNS // 32).byte().view(scale),
    }
    return mxfp4_section([]) | {
        "version": draw(st.sampled_from(["0.12.2", "0.13.0", "0.14.0"]))
    }, stored


@st.composite
def fp8_files(draw: st.DrawFn) -> tuple[Section, Tensors]:
    numbers, sizes = drawn(draw), st.sampled_from([8, 16, 48, 128])
    rows, columns = draw(sizes), draw(sizes)
    scale = numbers(120, 130, -(-ROWS // rows), -(-COLUMNS // columns)).byte()
    exponents = torch.uint8, torch.float8_e8m0fnu
    dtype = draw(st.sampled_from([*exponents, torch.float32, torch.bfloat16]))
    is_exponent = dtype in exponents
    scales = scale.view(dtype) if is_exponent else (scale.float() - 127).exp2().to(dtype)
    stored = {
        "weight": (numbers(-99, 99, ROWS, COLUMNS) / 16).to(torch.float8_e4m3fn),
        "weight_scale_inv": scales,
    }
    said = draw(st.sampled_from([[rows, columns], [rows, columns], [columns, rows]]))
    return {"quant_method": "fp8", "weight_block_size": said}, stored


@st.composite
def eight_files(draw: st.DrawFn) -> tuple[Section, Tensors]:
    numbers, kinds = drawn(draw), st.sampled_from(["int", "float"])
    strategies = st.sampled_from(["channel", "tensor", "block"])
    kind, strategy, block = (
        draw(kinds),
        draw(strategies),
        draw(st.sampled_from([[8, 48], [16, 32]])),
    )
    rows, columns = {"channel": [1, COLUMNS], "tensor": [ROWS, COLUMNS]}.get(strategy, block)
    scale = numbers(1, 99, -(-ROWS // rows), -(-COLUMNS // columns)).bfloat16() / 64
    weight = numbers(-99, 99, ROWS, COLUMNS)
    dtype = torch.int8 if kind == "int" else torch.float8_e4m3fn
    stored = {"weight": weight.to(dtype), "weight_scale": scale}
    if draw(st.booleans()):
        stored["weight_zero_point"] = torch.full(scale.shape, draw(st.integers(0, 1)))
    weights = {
        "num_bits": 8,
        "type": draw(st.sampled_from([kind, kind, "int"])),
        "strategy": draw(st.sampled_from([strategy, strategy, "channel"])),
        "block_structure": draw(st.sampled_from([block, block, [16, 32]])),
        "symmetric": True,
    }
    layout = {"int": "int-quantized", "float": "float-quantized"}[str(weights["type"])]
    group = {"targets": ["Linear"], "weights": weights}
    section = {"quant_method": "compressed-tensors", "format": layout}
    return section | {"config_groups": {"group_0": group}}, stored


FILES = {
    "eight": (eight_files(), eight_meant),
    "gptq": (gptq_files(), gptq_meant),
    "awq": (awq_files(), awq_meant),
    "compressed": (compressed_files(), compressed_meant),
    "mxfp4": (mxfp4_files(), mxfp4_meant),
    "fp8": (fp8_files(), fp8_meant),
}
"""Random sections and tensors of each form, and the weight by its published formula."""


def read_weight(folder: Path, section: Section, stored: Tensors) -> torch.Tensor:
    """Return the weight that the files mean. Raises ModelError."""
    named = {f"m.{name}": part.contiguous() for name, part in stored.items()}
    save_file(named, folder / "model.safetensors")
    files = WeightFiles(folder, {"quantization_config": section})
    columns = int(stored.get("weight_shape", torch.tensor([COLUMNS]))[-1])
    files.check([("m.weight", Parameter(torch.empty(ROWS, columns)))], tied=False)
    source = files.source("m.weight", (ROWS, columns))
    matrix = source.read()
    assert matrix.format == source.format
    for name, field in matrix.format.fields.items():
        part = matrix.fields[name]
        assert (part.dtype, *part.shape) == (field.dtype, ROWS, field.width(columns))
    return matrix.widened(torch.float32)


@pytest.mark.parametrize("form", FILES)
def test_files_mean_the_weights_of_their_form_or_are_refused(form: str, tmp_path: Path) -> None:
    """Sections are compared with random tensors, one of which may be cut. A file is read by the
    rule of its form's library, or refused if that has none."""
    files, meant = FILES[form]
    outcomes = set[bool]()

    @settings(max_examples=60, database=None, deadline=None, derandomize=True)
    @given(files, st.none() | st.integers(0, 9))
    def check(drawn: tuple[Section, Tensors], cut: int | None) -> None:
        section, stored = drawn
        expected = meant(section, stored)
        if cut is not None:
            # Zero points of 8 bits are all 0, in any shape.
            names = sorted(stored.keys() - ({"weight_zero_point"} if form == "eight" else set()))
            name = names[cut % len(names)]
            stored[name], expected = stored[name][..., 1:], None
        outcomes.add(expected is None)
        if expected is not None:
            found = read_weight(tmp_path, section, stored)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
            return
        with pytest.raises(ModelError) as error:
            read_weight(tmp_path, section, stored)
        assert "\n" not in str(error.value)

    check()
    assert outcomes == {True, False}
