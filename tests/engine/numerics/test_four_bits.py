"""4-bit checkpoints of each form: the weights that a model reads are those that the form means."""

from __future__ import annotations

import json
from collections.abc import Callable
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
from engine.weights.parameters import Build, Parameter, WeightSpec
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
    weight: torch.Tensor, *, zeros: bool, dtype: torch.dtype, group: int = GROUP
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes [M, N], scales and zeros [M, G], and the weight that they mean. The last group
    of a row may be smaller."""
    count = weight.shape[1]
    groups = torch.nn.functional.pad(weight, (0, -count % group)).unflatten(1, (-1, group))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / 15 if zeros else groups.abs().amax(-1) / 7).to(dtype)
    zero = (-low / scale.float()).round().clamp(1, 15) if zeros else torch.full_like(low, 8)
    codes = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15)
    meant = (codes - zero[..., None]) * scale.float()[..., None]
    return (
        codes.flatten(1)[:, :count].int(),
        scale,
        zero.int(),
        meant.flatten(1)[:, :count].contiguous(),
    )


def words(
    numbers: torch.Tensor, order: tuple[int, ...] | None = None, bits: int = 4
) -> torch.Tensor:
    """Pack eight or four numbers of the last dimension into an int32; ``order`` has the number of
    each place. The last word may have fewer."""
    count = 32 // bits
    padded = torch.nn.functional.pad(numbers.long(), (0, -numbers.shape[-1] % count))
    each = padded.unflatten(-1, (-1, count))
    packed = sum(each[..., n] << bits * place for place, n in enumerate(order or range(count)))
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


def compressed(weight: torch.Tensor, zeros: bool = False, group: int = GROUP) -> Made:
    codes, scale, zero, meant = coded(weight, zeros=zeros, dtype=torch.bfloat16, group=group)
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
    group = group_of(**{"strategy": "group", "group_size": GROUP} | weights)
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
    "compressed with a smaller last group": (  # Rows of 32, 64, 96 or 160 columns.
        lambda w: compressed(w, group=64),
        compressed_section("pack-quantized", type="int", symmetric=True, group_size=64),
        "int4 in groups of 64",
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
        ("gptq with zeros", {"sym": True}, "zero points than 8 in checkpoint_format gptq: "),
        ("awq", {"version": "gemv"}, "AWQ with version 'gemv'"),
        ("compressed", {"config_groups": {"a": group_of(strategy="tensor")}}, "strategy 'tensor'"),
        (
            "gptq",
            {"group_size": 64},
            r"of the wrong shape \(use the config of these files, or correct its bits and "
            r"group_size\): .*scales is .* instead of",
        ),
    ],
)
def test_descriptions_that_are_not_supported_are_named(form, change, match, checkpoint):
    path, _ = checkpoint("qwen3_next")
    make, section, _ = FORMS[form]
    rewrite(path, make, section | change)
    with pytest.raises(ModelError, match=match) as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, form",
    [("quantize_config.json", "gptq"), ("quant_config.json", "awq")],
)
def test_a_description_beside_the_config_is_read(name, form, checkpoint):
    """As AutoGPTQ and AutoAWQ wrote it. Without it, quantised weights are refused."""
    path, _ = checkpoint("qwen3_next")
    make, section, said = FORMS[form]
    rewrite(path, make, section)
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
    with pytest.raises(ModelError, match=f"{name} lacks a value|group_size None"):
        WeightFiles(path, config)


def test_dynamic_gives_modules_their_own_bits(tmp_path):
    """Some have 8 bits; excluded modules have plain weights."""
    torch.manual_seed(0)
    stored, meant = {}, {}
    for module, bits in (("a.q_proj", 4), ("a.k_proj", 8)):
        codes, zeros = torch.randint(2**bits, (16, 64)), torch.full((2, 16), 2 ** (bits - 1))
        scale = torch.rand(2, 16).half()
        stored |= {
            f"{module}.qweight": words(codes, bits=bits).T.contiguous(),
            f"{module}.qzeros": words(zeros - 1, bits=bits),
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


@pytest.mark.parametrize("version", ["0.12.2", "0.13.0", "0.13.1.a20260105"])
def test_exponents_of_before_the_change_are_refused(version):
    """Up to 0.13 they were stored less 2, so that all weights would be a quarter of their size."""
    section = FORMS["mxfp4"][1] | {"version": version}
    with pytest.raises(ModelError, match=f"mxfp4-pack-quantized with version {version}"):
        read_quantization({"quantization_config": section})
    assert read_quantization({"quantization_config": section | {"version": "0.14.0"}})


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
    with pytest.raises(ModelError, match=r"groups whose columns are not together .*desc_act"):
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
    # A scale in bfloat16 is rounded by at most 2**-9, and the largest number is 7 or 8 scales.
    assert stored[f"{stem}weight_scale"].dtype == torch.bfloat16
    assert ((meant - weight).abs() <= largest / 8 * (1 + 8 * 2**-9)).all()
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


# --- Sections that do not describe their tensors --------------------------------------------------

ROWS, COLUMNS = 16, 160
"""Size of a random weight, whose last group of 64 or 128 columns is partial."""
Section = dict[str, Any]
Tensors = dict[str, torch.Tensor]


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
    bits = weights["num_bits"]
    group = COLUMNS if weights["strategy"] == "channel" else weights["group_size"]
    zeros, num_groups = stored.get("weight_zero_point"), -(-COLUMNS // group)
    shapes = tuple(stored["weight_packed"].shape), tuple(stored["weight_scale"].shape)
    if shapes != ((ROWS, -(-COLUMNS * bits // 32)), (ROWS, num_groups)):
        return None
    if (zeros is None) != weights["symmetric"] or (weights["actorder"] == "group") != (
        "weight_g_idx" in stored
    ):
        return None
    codes = numbers_of(stored["weight_packed"], bits, COLUMNS)
    middle = torch.full((ROWS, num_groups), 2 ** (bits - 1))
    if zeros is not None:
        if tuple(zeros.shape) != (ROWS * bits // 32, num_groups):
            return None
        middle = numbers_of(zeros.T, bits, ROWS).T
    place = torch.arange(COLUMNS) // group
    return (codes - middle[:, place]) * stored["weight_scale"].float()[:, place]


def mxfp4_meant(section: Section, stored: Tensors) -> torch.Tensor | None:
    """Return the weight by the OCP's formula, or None for a version that stored less exponents."""
    exponents = stored["weight_scale"].int() - 127
    if section["version"] < "0.14" or (exponents == 128).any():
        return None
    packed = stored["weight_packed"].int()
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    signs = 1 - 2 * (codes >> 3)
    each = exponents.double().exp2().repeat_interleave(32, dim=1)
    return (E2M1[codes & 7] * signs * each).float()


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
        "qweight": words(numbers(0, 2**bits, ROWS, COLUMNS), bits=bits).T,
        "qzeros": words(zeros - first, bits=bits),
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
        "qweight": words(numbers(0, 16, COLUMNS, ROWS), order),
        "qzeros": words(numbers(0, 16, num_groups, ROWS), order),
        "scales": numbers(-99, 99, num_groups, ROWS).half() / 64,
    }
    said = draw(st.sampled_from([size, size, 32, 64]))
    return {"quant_method": "awq", "bits": 4, "group_size": said, "version": "gemm"}, stored


@st.composite
def compressed_files(draw: st.DrawFn) -> tuple[Section, Tensors]:
    numbers, bits = drawn(draw), draw(st.sampled_from([4, 8]))
    size = draw(st.sampled_from([None, 32, 64, 128]))
    num_groups = -(-COLUMNS // (size or COLUMNS))
    stored = {
        "weight_packed": words(numbers(0, 2**bits, ROWS, COLUMNS), bits=bits),
        "weight_scale": numbers(-99, 99, ROWS, num_groups).bfloat16() / 64,
        "weight_shape": torch.tensor([ROWS, COLUMNS]),
    }
    has_zeros, has_order = draw(st.booleans()), draw(st.booleans())
    if has_zeros:
        stored["weight_zero_point"] = words(numbers(0, 2**bits, num_groups, ROWS), bits=bits).T
    if has_order:
        stored["weight_g_idx"] = torch.arange(COLUMNS) // (size or COLUMNS)
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
    stored = {
        "weight_packed": numbers(0, 256, ROWS, COLUMNS // 2).byte(),
        "weight_scale": numbers(top - 6, top, ROWS, COLUMNS // 32).byte(),
    }
    section = compressed_section("mxfp4-pack-quantized", type="float")
    return section | {"version": draw(st.sampled_from(["0.12.2", "0.13.0", "0.14.0"]))}, stored


@st.composite
def fp8_files(draw: st.DrawFn) -> tuple[Section, Tensors]:
    numbers, sizes = drawn(draw), st.sampled_from([8, 16, 48, 128])
    rows, columns = draw(sizes), draw(sizes)
    scale = numbers(120, 130, -(-ROWS // rows), -(-COLUMNS // columns)).byte()
    dtype = draw(st.sampled_from([torch.uint8, torch.float32, torch.bfloat16]))
    scales = scale if dtype is torch.uint8 else (scale.float() - 127).exp2().to(dtype)
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
    files.check([("m.weight", Parameter(torch.empty(ROWS, COLUMNS)))], tied=False)
    source = files.source("m.weight", (ROWS, COLUMNS))
    matrix = source.read()
    assert matrix.format == source.format
    return matrix.widened(torch.float32)


@pytest.mark.parametrize("form", FILES)
def test_files_mean_the_weights_of_their_form_or_are_refused(form: str, tmp_path: Path) -> None:
    """Sections are compared with random tensors. A file is read by the rule of its form's library,
    or refused if that has none."""
    files, meant = FILES[form]
    outcomes = set[bool]()

    @settings(max_examples=40, database=None, deadline=None, derandomize=True)
    @given(files)
    def check(drawn: tuple[Section, Tensors]) -> None:
        section, stored = drawn
        expected = meant(section, stored)
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
