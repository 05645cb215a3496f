"""Published config.json files of models that are too large to load here, and refused variants."""

from __future__ import annotations

import dataclasses

import pytest
from huggingface_hub.dataclasses import type_validator
from transformers import CONFIG_MAPPING

from engine.models import families, read_model
from hybridcache.geometry.config_format import COMMON, ROPE_KEYS, WITHOUT_EFFECT, fits
from hybridcache.geometry.families import COMPOSITES, format_of
from hybridcache.geometry.model import ModelGeometry

LFM2 = {
    "model_type": "lfm2",
    "block_auto_adjust_ff_dim": True,
    "block_ff_dim": 12288,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 256,
    "conv_L_cache": 3,
    "conv_bias": False,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
    "hidden_size": 2048,
    "max_position_embeddings": 128000,
    "norm_eps": 1e-05,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
    "vocab_size": 65536,
}
FULL = [4, 8, 12, 16, 20, 24, 27]
KIMI_LINEAR = {
    "model_type": "kimi_linear",
    "dtype": "bfloat16",
    "first_k_dense_replace": 1,
    "head_dim": 72,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "kv_lora_rank": 512,
    "linear_attn_config": {
        "full_attn_layers": FULL,
        "head_dim": 128,
        "kda_layers": [layer for layer in range(1, 28) if layer not in FULL],
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
    "mla_use_nope": True,
    "model_max_length": 1048576,
    "moe_intermediate_size": 1024,
    "moe_renormalize": True,
    "num_attention_heads": 32,
    "num_expert_group": 1,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_hidden_layers": 27,
    "num_key_value_heads": 32,
    "num_shared_experts": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.446,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "v_head_dim": 128,
    "vocab_size": 163840,
}


@pytest.mark.parametrize(
    ("raw", "preset", "billions"),
    [(LFM2, "LFM2-1.2B", 1.17), (KIMI_LINEAR, "Kimi-Linear-48B-A3B", 48.5)],
    ids=["lfm2", "kimi_linear"],
)
def test_published_sizes_equal_the_presets(raw, preset, billions) -> None:
    _, config = read_model(raw)
    ours = ModelGeometry.from_sizes(preset, config.sizes)
    expected = ModelGeometry.preset(preset)
    assert ours.kv_bytes_per_token == expected.kv_bytes_per_token
    assert ours.state_bytes == expected.state_bytes
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    assert (ours.total_params + embeddings) / 1e9 == pytest.approx(billions, rel=0.02)


def test_family_specific_field_names() -> None:
    _, lfm2 = read_model(LFM2)
    assert (lfm2.norm_eps, lfm2.tie_embeddings, lfm2.rope.theta, lfm2.rope.dim) == (
        1e-5,
        True,
        1e6,
        64,
    )
    assert read_model(LFM2 | {"tie_embedding": False})[1].tie_embeddings is False
    _, kimi = read_model(KIMI_LINEAR)
    assert kimi.rope is None
    assert kimi.max_position == 1048576
    dense = [layer.mlp.intermediate for layer in kimi.sizes.layers]
    assert dense == [9216] + [1024] * 26


@pytest.mark.parametrize("model_type", sorted(families()))
def test_fields_have_the_names_types_and_defaults_of_transformers(model_type) -> None:
    """Each field of transformers' class is read, or is listed as one without effect."""
    text_type = model_type if model_type not in COMPOSITES else f"{model_type}_text"
    text_class = CONFIG_MAPPING[text_type]
    theirs = {field.name: field for field in dataclasses.fields(text_class)}
    ours = format_of(model_type)
    ignored = WITHOUT_EFFECT | ours.unused | set(COMMON) | set(ROPE_KEYS)
    assert set(theirs) - set(ours.fields) <= ignored
    assert set(ours.fields) <= set(theirs)
    for name, field in ours.fields.items():
        default = theirs[name].default
        assert field.default == (list(default) if isinstance(default, tuple) else default), name
        for value in (7, 0.5, True, "auto", None, ["x"], [7], [0.5], {}):
            if fits(value, field.kind):
                takes_floats = "float" in str(field.kind)  # transformers refuses integers here.
                whole = {str(7): 7.0, str([7]): [7.0]} if takes_floats else {}
                type_validator(name, whole.get(str(value), value), theirs[name].type)
    pairs = {frozenset(pair) for pair in text_class.attribute_map.items()}
    our_aliases = {frozenset(pair) for pair in ours.aliases.items()}
    assert {pair for pair in pairs if pair & set(ours.fields)} <= our_aliases
