"""Models in GGUF files: config and weights equal those of the checkpoint that they were made from.

The writer changes tensors as llama.cpp's converter does: its files have the converter's bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import BUILTIN_DIR
from engine.models import families, read_model
from engine.weights.gguf_names import FORMS, Model
from engine.weights.gguf_weights import GgufWeights
from engine.weights.model_config import ModelError
from engine.weights.parameters import Parameter, Source
from hybridcache.geometry.gguf import GgufFile
from hybridcache.geometry.gguf_config import ARCHITECTURES
from tests.engine.small_models import FAMILIES, load
from tests.gguf_files import changed, finish, text_config, write_gguf

WRITTEN = [
    name
    for name, family in FAMILIES.items()
    if not name.startswith("olmo") and "vision" not in name and not name.startswith("qwen3_next")
]


def model_of(path: Path) -> Model:
    return Model(GgufFile(path))


def weight(source: Source) -> torch.Tensor:
    """Return a weight in the order of the model."""
    found = source.read().widened(torch.float32)
    found = found if source.rows is None else found[source.rows]
    return found if source.columns is None else found[:, source.columns]


def one_by_one(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors with stacked experts taken apart, and the inputs of Qwen3.5's too."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, word = name.removesuffix(".weight").rpartition(".")
        if tensor.ndim != 3 or "conv" in name:
            found[name] = tensor
            continue
        stem = stem if stem.endswith("experts") else f"{stem}.experts"
        for expert, one in enumerate(tensor):
            parts = {word: one}
            if word == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), one.chunk(2), strict=True))
            found |= {f"{stem}.{expert}.{own}.weight": part for own, part in parts.items()}
    return found


def published(path: Path) -> dict[str, torch.Tensor]:
    raw = json.loads((path / "config.json").read_text())
    family, _ = read_model(raw)
    found = family.published(load_file(path / "model.safetensors"))
    if raw.get("tie_word_embeddings"):
        found.pop("lm_head.weight", None)
    return one_by_one({name: tensor.float() for name, tensor in found.items()})


def without_multipliers(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return Falcon-H1's weights times its multipliers."""
    config = text_config(json.loads((path / "config.json").read_text()))
    if config["model_type"] != "falcon_h1":
        return tensors
    attention, (gate, down) = config["attention_in_multiplier"], config["mlp_multipliers"]
    inner, states = config["mamba_n_heads"] * config["mamba_d_head"], 40
    widths = [inner, inner, states, states, config["mamba_n_heads"]]
    pairs = zip(config["ssm_multipliers"], widths, strict=True)
    inputs = torch.cat([torch.full((width, 1), factor) for factor, width in pairs])
    factors = {
        "q_proj": attention,
        "k_proj": attention * config["key_multiplier"],
        "v_proj": attention,
        "o_proj": config["attention_out_multiplier"],
        "gate_proj": gate,
        "down_proj": down,
        "in_proj": config["ssm_in_multiplier"] * inputs,
        "out_proj": config["ssm_out_multiplier"],
        "embed_tokens": config["embedding_multiplier"],
        "lm_head": config["lm_head_multiplier"],
    }
    words = {name: name.removesuffix(".weight").rpartition(".")[2] for name in tensors}
    return {
        name: tensor * factors.get(words[name], 1.0) if name.endswith(".weight") else tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("name", WRITTEN)
def test_config_equals_that_of_the_checkpoint(name, oracles, tmp_path) -> None:
    path = oracles(name).path
    write_gguf(gguf, path, tmp_path / "model.gguf")
    found_family, found = read_model(model_of(tmp_path / "model.gguf").config)
    expected_family, expected = read_model(json.loads((path / "config.json").read_text()))
    assert found_family is expected_family
    for field in ("sizes", "norm_eps", "rope", "tie_embeddings", "max_position", "attention_bias"):
        assert getattr(found, field) == getattr(expected, field), field
    absent = {"time_step_limit"}  # llama.cpp has no limits of time steps.
    if name.startswith("falcon"):
        absent |= {key for key in expected.own if "multiplier" in key}
        absent |= {"mamba_norm_before_gate"}  # llama.cpp always has the norm after the gate.
    own = expected.own.keys() - absent
    assert {key: found.own[key] for key in own} == {key: expected.own[key] for key in own}


def test_every_architecture_has_a_config_and_names() -> None:
    assert FORMS.keys() == ARCHITECTURES.keys()
    assert {model_type for model_type, _ in ARCHITECTURES.values()} <= families().keys()


@pytest.mark.parametrize("name", WRITTEN)
def test_weights_equal_those_of_the_checkpoint(name, oracles, tmp_path) -> None:
    """In float32 all bits are equal, except where the converter computes."""
    path = oracles(name).path
    write_gguf(gguf, path, tmp_path / "model.gguf")
    found = model_of(tmp_path / "model.gguf").weights()
    expected = without_multipliers(path, published(path))
    assert found.keys() == expected.keys()
    for key, source in found.items():
        assert source.shape == expected[key].shape, key
        if key.endswith(("norm.weight", "A_log")) or name.startswith("falcon"):
            assert torch.allclose(weight(source), expected[key], rtol=1e-6, atol=1e-7), key
        else:
            assert torch.equal(weight(source), expected[key]), key


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("kind", ["Q8_0", "BF16"])
def test_stored_rows_are_gathered_without_decoding(name, kind, oracles, tmp_path) -> None:
    """A quantised file has the numbers of quantised weights of the checkpoint."""
    path = oracles(name).path
    write_gguf(gguf, path, tmp_path / "model.gguf", kind)
    found = model_of(tmp_path / "model.gguf").weights()
    expected = without_multipliers(path, published(path))
    kinds = gguf.GGMLQuantizationType
    num_blocks = 0
    for key, source in found.items():
        if source.format.describe() not in ("Q8_0", "bfloat16", "float16"):
            continue
        num_blocks += source.format.describe() == "Q8_0"
        own = kinds[
            {"Q8_0": "Q8_0", "bfloat16": "BF16", "float16": "F16"}[source.format.describe()]
        ]
        original = expected[key]
        if source.columns is not None:  # Blocks are along the columns of the file.
            original = original[:, source.columns.argsort()]
        blocks = gguf.quants.quantize(np.ascontiguousarray(original.numpy()), own)
        numbers = torch.from_numpy(gguf.quants.dequantize(blocks, own).copy())
        if source.columns is not None:
            numbers = numbers[:, source.columns]
        assert torch.equal(weight(source), numbers), key
    assert num_blocks > 5 or kind != "Q8_0"


def test_tensors_are_views_of_the_file(oracles, tmp_path) -> None:
    write_gguf(gguf, oracles("qwen3").path, tmp_path / "model.gguf", "Q8_0")
    model = model_of(tmp_path / "model.gguf")
    stored = model.file.tensors["blk.0.attn_q.weight"]
    read = model.weights()["model.layers.0.self_attn.q_proj.weight"].read()
    assert read.fields["blocks"].data_ptr() == stored.data.ctypes.data


# --- Qwen3-Next and the built-in model ------------------------------------------------------------


def separate(tensors: dict[str, torch.Tensor], heads: int, sizes: list[int], group: int) -> None:
    """Replace Qwen3-Next's interleaved inputs by those of Qwen3.5."""
    for name in [name for name in tensors if name.endswith("in_proj_qkvz.weight")]:
        stem = name.removesuffix("qkvz.weight")
        qkvz = tensors.pop(name).view(heads, sum(sizes), -1).split(sizes, dim=1)
        *qkv, z = (part.flatten(0, 1) for part in qkvz)
        b, a = tensors.pop(f"{stem}ba.weight").view(heads, 2 * group, -1).split(group, dim=1)
        tensors |= {f"{stem}qkv.weight": torch.cat(qkv), f"{stem}z.weight": z}
        tensors |= {f"{stem}b.weight": b.flatten(0, 1), f"{stem}a.weight": a.flatten(0, 1)}


@pytest.fixture
def sparse_next(checkpoint) -> Path:
    """Checkpoint of Qwen3-Next without dense layers, which GGUF does not have."""
    path, tensors = checkpoint("qwen3_next")
    config = json.loads((path / "config.json").read_text()) | {"mlp_only_layers": []}
    (path / "config.json").write_text(json.dumps(config))
    for name in [name for name in tensors if name.startswith("model.layers.2.mlp.")]:
        tensors[name.replace("layers.2", "layers.1")] = tensors[name].clone()
    for name in [name for name in tensors if name.startswith("model.layers.1.mlp.gate_proj")]:
        del tensors[name]
    for word in ("gate", "up", "down"):
        tensors.pop(f"model.layers.1.mlp.{word}_proj.weight", None)
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.mark.parametrize("is_legacy", [False, True])
def test_qwen3_next_has_the_names_of_qwen3_5(is_legacy, sparse_next, tmp_path) -> None:
    """Its inputs are fused in the checkpoint and separate in GGUF, in old files only fused."""
    write_gguf(gguf, sparse_next, tmp_path / "model.gguf")
    model = model_of(tmp_path / "model.gguf")
    expected = published(sparse_next)
    if is_legacy:
        tensors = dict(model.file.tensors)
        for layer in range(3):
            fused = expected[f"model.layers.{layer}.linear_attn.in_proj_qkvz.weight"]
            gate = tensors.pop(f"blk.{layer}.attn_gate.weight")
            del tensors[f"blk.{layer}.attn_qkv.weight"]
            data = fused.contiguous().view(torch.uint8).flatten().numpy()
            stored = type(gate)(tuple(fused.shape), gate.type, data)
            tensors[f"blk.{layer}.ssm_in.weight"] = stored
        model.file.tensors = tensors
    separate(expected, heads=2, sizes=[20, 20, 48, 48], group=2)
    found = model.weights()
    assert found.keys() == expected.keys()
    for name, source in found.items():
        assert torch.allclose(weight(source), expected[name], rtol=1e-6, atol=1e-7), name
    _, config = read_model(model.config)
    assert (
        config.sizes == read_model(json.loads((sparse_next / "config.json").read_text()))[1].sizes
    )


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_built_in_model_is_written_and_read_with_its_head(kind, tmp_path) -> None:
    """Its dense layers are those of Qwen3.5. The multi-token head is one block more."""
    write_gguf(gguf, BUILTIN_DIR, tmp_path / "model.gguf", kind)
    model = model_of(tmp_path / "model.gguf")
    found, expected = model.weights(), published(BUILTIN_DIR)
    separate(expected, heads=4, sizes=[32, 32, 64, 64], group=2)
    assert found.keys() == expected.keys()
    assert {"mtp.fc.weight", "mtp.norm.weight", "mtp.layers.0.mlp.up_proj.weight"} < found.keys()
    for name, source in found.items():
        assert source.shape == expected[name].shape
        error = (weight(source) - expected[name]).abs().max() / expected[name].abs().max()
        assert error < {"F32": 1e-6, "Q8_0": 0.01, "Q4_0": 0.13}[kind], name
    _, config = read_model(model.config)
    _, original = read_model(json.loads((BUILTIN_DIR / "config.json").read_text()))
    assert (config.sizes, config.rope) == (original.sizes, original.rope)
    out = found["model.layers.0.linear_attn.out_proj.weight"]
    assert out.columns is not None and out.columns[:64].tolist() == [*range(32), *range(128, 160)]


def test_value_heads_are_tiled_by_key_head() -> None:
    """Value heads 0 1 | 2 3 of two key heads become 0 2 1 3 in every tensor, and back."""
    config = {f"linear_num_{kind}_heads": n for kind, n in (("key", 2), ("value", 4))}
    config |= {"linear_key_head_dim": 3, "linear_value_head_dim": 2}
    stem = "model.layers.0.linear_attn"
    tensors = {
        f"{stem}.A_log": torch.arange(4.0),
        f"{stem}.in_proj_z.weight": torch.arange(8.0)[:, None].repeat(1, 2),
        f"{stem}.conv1d.weight": torch.arange(20.0)[:, None, None].repeat(1, 1, 4),
        f"{stem}.out_proj.weight": torch.arange(8.0)[None].repeat(2, 1),
    }
    decay, gate, conv, out = (one for _, one in changed("qwen35", config, tensors))
    heads = [0, 1, 4, 5, 2, 3, 6, 7]
    assert torch.equal(decay, -torch.tensor([0.0, 2, 1, 3]).exp())
    assert gate[:, 0].tolist() == out[0].tolist() == heads
    assert conv[:, 0].tolist() == [*range(12), *(12 + head for head in heads)]


# --- Other forms ----------------------------------------------------------------------------------


def rewritten(path: Path, change: Callable[[dict[str, np.ndarray]], None], **metadata) -> Model:
    """Write the file again with other tensors or metadata."""
    reader, file = gguf.GGUFReader(path), GgufFile(path)
    tensors = {one.name: np.array(one.data) for one in reader.tensors}
    change(tensors)
    arch = file.metadata["general.architecture"]
    writer = gguf.GGUFWriter(path.with_name("again.gguf"), arch)
    values = {key: value for key, value in file.metadata.items() if key.startswith(arch)}
    for key, value in {**values, **{f"{arch}.{k}": v for k, v in metadata.items()}}.items():
        value = value.tolist() if isinstance(value, np.ndarray) else value
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values))
    finish(writer)
    return model_of(path.with_name("again.gguf"))


@pytest.fixture
def written(oracles, tmp_path):
    def write(family: str, kind: str = "F32") -> Path:
        path = tmp_path / f"{family}-{kind}.gguf"
        write_gguf(gguf, oracles(family).path, path, kind)
        return path

    return write


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_moe", "granite_moe_hybrid"])
def test_fused_inputs_are_split(name, written) -> None:
    """llama.cpp's converter can fuse q, k and v, and gate and up of the experts."""
    path = written(name)
    expected = model_of(path).weights()

    def fuse(tensors: dict[str, np.ndarray]) -> None:
        for block in range(model_of(path).num_layers):
            for whole, words, axis in (
                ("attn_qkv", ("attn_q", "attn_k", "attn_v"), 0),
                ("ffn_gate_up_exps", ("ffn_gate_exps", "ffn_up_exps"), 1),
            ):
                for ending in ("weight", "bias"):
                    names = [f"blk.{block}.{word}.{ending}" for word in words]
                    if tensors.keys() >= {*names}:
                        parts = [tensors.pop(own) for own in names]
                        tensors[f"blk.{block}.{whole}.{ending}"] = np.concatenate(parts, axis)

    model = rewritten(path, fuse)
    assert model.config == model_of(path).config
    found = model.weights()
    assert found.keys() == expected.keys()
    for key, source in found.items():
        assert torch.equal(weight(source), weight(expected[key])), key


def test_parts_of_different_formats_are_joined_in_float32(written) -> None:
    path = written("granite_moe_hybrid_dense")
    name = "model.layers.0.shared_mlp.input_linear.weight"
    expected = weight(model_of(path).weights()[name])

    def narrow(tensors: dict[str, np.ndarray]) -> None:
        tensors["blk.0.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"].astype(np.float16)

    found = rewritten(path, narrow).weights()[name]
    assert found.format.describe() == "float32"
    assert torch.equal(weight(found)[:36], expected[:36])
    assert torch.equal(weight(found)[36:], expected[36:].half().float())


def test_old_files_of_kimi_linear_have_one_product_of_the_latent(written, oracles) -> None:
    path = written("kimi_linear")
    name = "model.layers.2.self_attn.kv_b_proj.weight"
    expected = published(oracles("kimi_linear").path)[name]

    def join(tensors: dict[str, np.ndarray]) -> None:
        del tensors["blk.2.attn_k_b.weight"], tensors["blk.2.attn_v_b.weight"]
        tensors["blk.2.attn_kv_b.weight"] = expected.numpy()

    assert torch.equal(weight(rewritten(path, join).weights()[name]), expected)


def change_nothing(tensors: dict[str, np.ndarray]) -> None:
    pass


def drop(name: str) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: tensors.pop(name)


def cut(name: str) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: tensors.update({name: tensors[name][:3]})


def put(name: str) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: tensors.update({name: tensors["output_norm.weight"]})


def wrap(name: str) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: tensors.update({name: tensors[name][None]})


def factors(value: float) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: tensors.update({"rope_freqs.weight": np.full(16, value, np.float32)})


def test_rotary_factors_of_1_are_ignored_with_a_word(written) -> None:
    path = written("qwen3")
    expected = load(path).loaded.weights_note
    rewritten(path, factors(1))
    found = load(path.with_name("again.gguf")).loaded.weights_note
    assert "buffers in its files" in found and "buffers in its files" not in expected


def test_files_of_ollamas_converter_are_read(written, oracles) -> None:
    """They have the visual tower, ``ssm_dt`` without a suffix, three sections of rotary dimensions,
    and the number of KV heads of each layer."""
    path = written("qwen3_5")
    expected = {name: weight(source) for name, source in model_of(path).weights().items()}
    _, config = read_model(model_of(path).config)
    kinds = model_of(path).config["layer_types"]
    heads = [2 * (kind == "full_attention") for kind in kinds]

    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.endswith("ssm_dt.bias")]:
            tensors[name.removesuffix(".bias")] = tensors.pop(name)
        tensors["v.patch_embed.weight"] = np.zeros((6, 2, 4, 4), np.float32)
        tensors["v.blk.0.attn_q.weight"] = np.zeros((8, 8), np.float32)

    count = int(model_of(path).number("attention.head_count_kv"))
    metadata = {
        "attention.head_count_kv": [count * (kind > 0) for kind in heads],
        "rope.dimension_sections": [11, 11, 10],
        "rope.mrope_interleaved": True,
        "ssm.v_head_reordered": True,
    }
    model = rewritten(path, change, **metadata)
    assert read_model(model.config)[1] == config
    weights = GgufWeights(model)
    assert "its visual tower is not supported" in weights.note()
    weights.check([(name, Parameter(one)) for name, one in expected.items()], tied=True)
    for name, tensor in expected.items():
        assert torch.equal(weight(weights.source(name, tensor.shape)), tensor), name
    stored = model_of(path).file.tensors["blk.0.ssm_a"].data.view(np.float32)
    grouped = rewritten(path, change_nothing, **{"ssm.v_head_reordered": False}).weights()
    name = "model.layers.0.linear_attn.A_log"
    assert np.allclose(weight(grouped[name]), np.log(-stored), rtol=1e-5)
    assert not torch.equal(weight(grouped[name]), expected[name])


@pytest.mark.parametrize(
    "metadata, factor",
    [
        ({"rope.scaling.factor": 4.0}, 4),
        ({"rope.scale_linear": 4.0}, 4),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4),
        ({"rope.scaling.type": "linear"}, 1),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, 1),
        ({"rope.scaling.factor": 0.0}, 1),
        ({"rope.scaling.attn_factor": 1.0}, 1),
    ],
)
def test_rotary_scaling_is_that_of_llama_cpp(metadata, factor, written) -> None:
    path = written("qwen3")
    plain = read_model(model_of(path).config)[1].rope.frequencies
    found = read_model(rewritten(path, change_nothing, **metadata).config)[1].rope
    assert found.frequencies == pytest.approx([one / factor for one in plain])
    assert found.factor == 1


def test_rotary_dimensions_are_those_of_the_file(written) -> None:
    """Also if they are not the usual quarter of a head."""
    model = rewritten(written("qwen3_5"), change_nothing, **{"rope.dimension_count": 4})
    assert len(read_model(model.config)[1].rope.frequencies) == 2


GRANITE, KIMI = "granite_moe_hybrid_dense", "kimi_linear"
FAULTS = {
    "unknown": ("qwen3", put("blk.0.colour"), "that models of qwen3 do not have: blk.0.colour"),
    "past the last": ("qwen3", put("blk.9.attn_norm.weight"), "not have: blk.9.attn_norm.weight"),
    "no embedding": ("qwen3", drop("token_embd.weight"), "has no tensor token_embd.weight"),
    "half": (GRANITE, drop("blk.0.ffn_up.weight"), "half of model.layers.0.shared_mlp.input_lin"),
    "unequal halves": (GRANITE, cut("blk.0.ffn_up.weight"), "has the wrong shape, [3, 64]"),
    "two of one": ("qwen3", put("blk.0.attn_norm"), "several tensors for model.layers.0.input_lay"),
    "rotated heads": (GRANITE, cut("blk.1.attn_k.weight"), "blk.1.attn_k.weight in again.gguf has"),
    "experts": ("lfm2_moe", cut("blk.2.ffn_up_exps.weight"), "has the wrong shape, [3, 20, 64]"),
    "dimensions": ("qwen3", wrap("blk.0.attn_q.weight"), "has the wrong shape, [1, 128, 64]"),
    "rotary": ("qwen3", factors(0.5), "again.gguf changes rotary frequencies (rope_freqs.weight)"),
    "latent": (KIMI, cut("blk.2.attn_v_b.weight"), "has the wrong shape"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_that_do_not_fit_are_refused(fault, written) -> None:
    family, change, message = FAULTS[fault]
    with pytest.raises(ModelError) as error:
        model = rewritten(written(family), change)
        read_model(model.config)
        model.weights()
    assert message in str(error.value)
    assert str(error.value).count(". ") == 0


@pytest.mark.parametrize(
    ("name", "metadata", "message"),
    [
        ("qwen3", {"block_count": 0}, "qwen3.block_count in again.gguf must be 1 to 10,000 layers"),
        (
            "qwen3",
            {"embedding_length": "x"},
            "qwen3.embedding_length in again.gguf must be a number",
        ),
        ("qwen3", {"context_length": 1.5}, "max_position_embeddings"),
        ("qwen3", {"attention.head_count": [1.5]}, "num_attention_heads"),
        ("lfm2", {"attention.head_count_kv": [0]}, "must be 4 whole numbers (got [0])"),
        ("jamba", {"attention.head_count_kv": [2, 2, 0]}, "must be at a fixed period (got [0, 1])"),
        (
            "qwen3",
            {"rope.scaling.attn_factor": 0.5},
            "qwen3.rope.scaling.attn_factor 0.5 in again.gguf is not supported; 1 is.",
        ),
        (
            "qwen3",
            {"rope.scaling.type": "longrope"},
            "'longrope' (rope_parameters) are not supported",
        ),
    ],
)
def test_metadata_that_no_model_has_is_refused(name, metadata, message, written) -> None:
    with pytest.raises(ModelError) as error:
        read_model(rewritten(written(name), change_nothing, **metadata).config)
    assert message in str(error.value)


def test_unknown_architectures_are_named(tmp_path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    finish(writer)
    with pytest.raises(
        ModelError, match=r"the architecture 'mamba' in model\.gguf .* falcon-h1, gr"
    ):
        model_of(tmp_path / "model.gguf")
