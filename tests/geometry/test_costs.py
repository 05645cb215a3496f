"""Tests of model geometry: bytes against published values, FLOPs against first principles, times
against tables."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest

from engine.config import BUILTIN_DIR
from hybridcache.geometry.model import ModelGeometry, presets
from hybridcache.geometry.times import MeasuredTimes, Roofline
from tests.engine.device_models import QWEN3_NEXT_80B
from tests.gguf_files import write_gguf
from tests.refused import refused


@pytest.mark.parametrize("name", list(presets()))
def test_preset_bytes_match_the_published_derivation(name: str) -> None:
    geometry, derived = ModelGeometry.preset(name), presets()[name]["derived"]
    assert geometry.kv_bytes_per_token == derived["kv_bytes_per_token_bf16"]
    assert geometry.recurrent_bytes == derived["recurrent_state_bytes"]
    assert geometry.conv_bytes == derived["conv_state_bytes"]
    assert round(geometry.state_tokens) == pytest.approx(derived["state_equals_kv_tokens"], abs=1)
    assert 0 < geometry.active_params <= geometry.total_params


PUBLISHED = {
    "Granite-4.0-H-Tiny": {
        "model_type": "granitemoehybrid",
        "hidden_size": 1536,
        "num_hidden_layers": 40,
        "layer_types": [
            "attention" if layer in (5, 15, 25, 35) else "mamba" for layer in range(40)
        ],
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "mamba_n_heads": 48,
        "mamba_d_head": "auto",
        "mamba_d_state": 128,
        "mamba_n_groups": 1,
        "mamba_d_conv": 4,
        "num_local_experts": 64,
        "num_experts_per_tok": 6,
        "intermediate_size": 512,
        "shared_intermediate_size": 1024,
    },
    "Falcon-H1-0.5B": {
        "model_type": "falcon_h1",
        "hidden_size": 1024,
        "num_hidden_layers": 36,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "mamba_d_ssm": 1536,
        "mamba_n_heads": 24,
        "mamba_d_head": "auto",
        "mamba_d_state": 128,
        "mamba_n_groups": 1,
        "mamba_d_conv": 4,
        "intermediate_size": 2048,
    },
    "Jamba-1.5-Mini": {
        "model_type": "jamba",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "intermediate_size": 14336,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_of_mamba_models_agree_with_their_presets(name: str) -> None:
    config = {key: value for key, value in PUBLISHED[name].items() if "dtype" not in key}
    geometry, preset = ModelGeometry.from_config(config), ModelGeometry.preset(name)
    wide = ModelGeometry.from_config(config | {"dtype": "torch.float32"})
    assert wide.kv_bytes_per_token == 2 * geometry.kv_bytes_per_token
    assert wide.conv_bytes == 2 * geometry.conv_bytes
    assert wide.recurrent_bytes == geometry.recurrent_bytes
    assert geometry.kv_bytes_per_token == preset.kv_bytes_per_token
    assert geometry.recurrent_bytes == preset.recurrent_bytes
    assert geometry.conv_bytes == preset.conv_bytes
    assert geometry.num_full_layers == preset.num_full_layers
    assert geometry.num_linear_layers == preset.num_linear_layers
    assert geometry.total_params == pytest.approx(preset.total_params, rel=0.3)


@pytest.mark.parametrize(
    "config",
    [
        QWEN3_NEXT_80B | {"layer_types": ["full_attention", "wormhole"]},
        PUBLISHED["Granite-4.0-H-Tiny"] | {"layer_types": ["mamba", "wormhole"]},
        PUBLISHED["Jamba-1.5-Mini"] | {"model_type": "wormhole"},  # not an attention-only model
        {
            "model_type": "nemotron_h",
            "hidden_size": 64,
            "num_attention_heads": 4,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
            "conv_kernel": 4,
            "num_key_value_heads": 2,
            "layers_block_type": ["mamba", "wormhole"],
        },
    ],
    ids=["qwen3_next", "granitemoehybrid", "unknown", "nemotron_h"],
)
def test_unknown_layer_type_is_named_in_the_error(config) -> None:
    refused("wormhole", ModelGeometry.from_config, config)


MAMBA = dict(zip(("mamba_n_heads", "mamba_d_state", "mamba_d_conv"), (64, 128, 4), strict=True))
MAMBA |= {"mamba_d_head": 64, "mamba_n_groups": 1, "mamba_expand": 2}
FOREIGN = {"model_type": "my_hybrid", "hidden_size": 2048, "num_hidden_layers": 8}
FOREIGN |= {"num_attention_heads": 16, "intermediate_size": 8192}
IN_TURN = ["mamba", "attention"] * 4


@pytest.mark.parametrize(
    ("more", "num_full", "num_linear", "said"),
    [
        ({"layers_block_type": IN_TURN} | MAMBA, 4, 4, "4 of mamba, 4 of attention (layers_b"),
        ({"hybrid_pattern": "M-M*M-M-"} | MAMBA, 1, 4, "4 of mamba, 3 of mlp, 1 of attention"),
        ({}, 8, 0, "none with a state: there is none of layer_types"),
        ({"layers_block_type": IN_TURN}, 0, 0, "the field 'mamba_n_heads' is missing: add it"),
        ({"attn_layer_period": 4, "attn_layer_offset": 1}, 0, 0, "attn_layer_period tells of lin"),
        ({"hybrid_override_pattern": "M*" * 4, "mamba_num_heads": 8}, 0, 0, "to nemotron_h"),
        ({"layers_block_type": ["mamba", "hybrid"] * 4} | MAMBA, 0, 0, "unknown types: hybrid"),
    ],
)
def test_a_config_of_an_unknown_type_says_how_it_was_read(
    more: dict[str, Any], num_full: int, num_linear: int, said: str
) -> None:
    says, kind = (pytest.warns, UserWarning) if num_full else (pytest.raises, ValueError)
    with says(kind, match=re.escape(said)):
        found = ModelGeometry.from_config(FOREIGN | more)
        assert (found.num_full_layers, found.num_linear_layers) == (num_full, num_linear)
        assert (found.state_bytes > 0) == (num_linear > 0)


@pytest.mark.parametrize("name", ["qwen3.5", "no-such-model"])
def test_ambiguous_or_unknown_preset_lists_the_names(name: str) -> None:
    refused(r"Qwen3\.5-0\.8B", ModelGeometry.preset, name)


def test_sizes_are_whole_numbers() -> None:
    for wrong in ({"kv_bytes_per_token": 0}, {"active_params": None}, {"conv_bytes": -1}):
        refused("must be whole, at least", replace, ModelGeometry.preset("qwen3-next"), **wrong)


def test_load_accepts_a_directory_a_file_and_a_preset(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_NEXT_80B))
    from_dir = ModelGeometry.load(str(tmp_path))
    assert from_dir == ModelGeometry.load(str(tmp_path / "config.json"))
    assert from_dir.state_bytes == ModelGeometry.load("qwen3-next").state_bytes
    assert from_dir.name == tmp_path.name
    assert ModelGeometry.load("builtin").name == "builtin"
    (tmp_path / "next-80b.json").write_text(json.dumps(QWEN3_NEXT_80B | {"attention_bia": 1}))
    with pytest.warns(UserWarning, match="attention_bia is not read, did you mean attention_bias"):
        assert ModelGeometry.load(str(tmp_path / "next-80b.json")).name == "next-80b"


def test_geometry_of_a_gguf_file_is_that_of_its_config_json(tmp_path: Path) -> None:
    """Named by the file, or by the folder that has only this one."""
    write_gguf(gguf, BUILTIN_DIR, tmp_path / "tiny-BF16.gguf", "BF16")
    found, expected = (
        ModelGeometry.load(f"{tmp_path}/tiny-BF16.gguf"),
        ModelGeometry.load("builtin"),
    )
    assert found == replace(expected, name="tiny-BF16")
    assert ModelGeometry.load(str(tmp_path)) == replace(expected, name=tmp_path.name)
    shutil.copy(tmp_path / "tiny-BF16.gguf", tmp_path / "tiny-F16.gguf")
    with pytest.raises(ValueError, match=r"several models: choose one of tiny-BF16.* tiny-F16"):
        ModelGeometry.load(str(tmp_path))


def test_flops_are_additive_over_a_split_prefill() -> None:
    geometry = ModelGeometry.preset("olmo-hybrid")
    assert geometry.flops(0, 5000) == geometry.flops(0, 1234) + geometry.flops(1234, 5000)
    assert geometry.flops(700, 700) == 0
    assert geometry.flops(0, 1) >= 2 * geometry.active_params


def test_roofline_is_monotone_and_zero_for_no_tokens() -> None:
    times = Roofline(ModelGeometry.preset("qwen3-next"))
    assert times.seconds(900, 900) == 0.0
    ends = [times.seconds(0, end) for end in (1, 64, 1024, 8192, 65536)]
    assert ends == sorted(ends) and ends[0] >= times.overhead_s
    assert times.seconds(4096, 8192) < times.seconds(0, 8192)


def test_measured_times_interpolate_and_extrapolate(tmp_path) -> None:
    path = tmp_path / "times.json"
    path.write_text(
        json.dumps(
            {"starts": [0, 1000], "lengths": [100, 200], "table_s": [[1.0, 2.0], [2.0, 4.0]]}
            | {"device": "another field"}
        )
    )
    times = MeasuredTimes.load(path)
    assert times.seconds(0, 100) == 1.0
    assert times.seconds(500, 650) == pytest.approx(2.25)
    assert times.seconds(1000, 1300) == pytest.approx(6.0)
    assert times.seconds(5, 5) == 0.0
    assert MeasuredTimes((0,), (100, 200), ((1.0, 2.0),)).seconds(77, 227) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ('"starts": [1000, 0]', "starts must ascend (got (1000, 0))."),
        ('"starts": [5, 1000]', "starts must begin with 0"),
        ('"decode": [4], "decode_s": [1]', "decode_s one number per decode"),
        ('"starts": 5', "not iterable"),
        ('"starts": [0]', "one row per start"),
        ('"lengths": [200, 100]', "lengths must ascend"),
        ('"table_s": [[1, 2], [3]]', "one row per start and one number per length"),
        ('"table_s": [[1, 2], [3, -4]]', "must be seconds of 0 or more (got -4)."),
        ('"table_s": [[1, 2], [3, NaN]]', "(got nan)"),
        ('"table_s": [[1, 2], [3, "4"]]', "not supported between"),
        ('"table_s": [[1, 2], [4, 3]]', "must not fall along lengths, as it does after 1000"),
        ('"decodes": [4, 4], "decode_s": [1, 1]', "decodes must ascend"),
    ],
)
def test_wrong_tables_of_times_are_refused(tmp_path, wrong: str, message: str) -> None:
    path = tmp_path / "times.json"
    good = '"starts": [0, 1000], "lengths": [100, 200], "table_s": [[1, 2], [2, 4]]'
    path.write_text(f"{{{good}, {wrong}}}")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        MeasuredTimes.load(path)
    assert str(caught.value).startswith(f"{path}: not a table of prefill times: ")
    for text in ("[]", "{}", "x"):
        path.write_text(text)
        refused("not a table of prefill times", MeasuredTimes.load, path)
