"""Nemotron-H: every layer is either a Mamba-2 mixer, attention, an MLP or experts."""

from __future__ import annotations

import math

from hybridcache.geometry.config_format import Config, Entry, Schema, Values, table
from hybridcache.geometry.families import fields
from hybridcache.geometry.mixers import MambaSizes
from hybridcache.geometry.sizes import LayerSizes, ModelSizes, SizesError

LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
"""Letters of ``hybrid_override_pattern`` and the matching types of ``layers_block_type``."""


def complete(values: Values) -> None:
    """Derive the number of layers from the layer types; ``num_hidden_layers`` is ignored."""
    pattern = values.pop("hybrid_override_pattern", None)
    if values["layers_block_type"] is None and pattern is not None:
        values["layers_block_type"] = [LETTERS.get(letter, letter) for letter in pattern]
    elif values["layers_block_type"] is None:
        values["layers_block_type"] = ["linear_attention", "moe", "full_attention", "mlp"]
    count = fields.check_size("layers_block_type", len(values["layers_block_type"]))
    values["num_hidden_layers"] = count
    if values["moe_shared_expert_intermediate_size"] == 0:
        values["moe_shared_expert_intermediate_size"] = values["intermediate_size"]


FORMATS = {
    "nemotron_h": Schema(
        table(
            vocab_size=131072,
            hidden_size=4096,
            layers_block_type=Entry(list[str] | None),
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=4096,
            sliding_window=Entry(int | None),
            intermediate_size=21504,
            mlp_hidden_act="relu2",
            mlp_bias=False,
            ssm_state_size=128,
            mamba_num_heads=128,
            mamba_head_dim=64,
            mamba_hidden_act="silu",
            n_groups=8,
            conv_kernel=4,
            time_step_limit=Entry(list[float], [0.0, math.inf]),
            use_conv_bias=True,
            n_routed_experts=8,
            moe_intermediate_size=7688,
            moe_shared_expert_intermediate_size=7688,
            moe_latent_size=Entry(int | None),
            num_experts_per_tok=2,
            routed_scaling_factor=1.0,
            n_group=1,
            topk_group=1,
            norm_topk_prob=True,
            use_bias=False,
            layer_norm_epsilon=1e-5,
        ),
        aliases={
            "layer_types": "layers_block_type",
            "num_local_experts": "n_routed_experts",
            "mamba_n_groups": "n_groups",
            "mamba_d_conv": "conv_kernel",
            "mamba_dt_limit": "time_step_limit",
            "mamba_conv_bias": "use_conv_bias",
        },
        extras={"hybrid_override_pattern": str},
        complete=complete,
    )
}


def sizes(config: Config) -> ModelSizes:
    heads, groups = fields.size_of(config, "mamba_num_heads"), fields.size_of(config, "n_groups")
    fields.check_multiple("mamba_num_heads", heads, "n_groups", groups)
    mamba = MambaSizes(
        num_heads=heads,
        head_dim=fields.size_of(config, "mamba_head_dim"),
        state_dim=fields.size_of(config, "ssm_state_size"),
        num_groups=groups,
        conv_width=fields.size_of(config, "conv_kernel"),
    )
    made = {
        "linear_attention": LayerSizes((mamba,)),
        "full_attention": LayerSizes((fields.attention(config),)),
        "mlp": LayerSizes(mlp=fields.dense(config, matrices=2)),
        "moe": LayerSizes(mlp=fields.experts(config, matrices=2)),
    }
    words = fields.sorts(config, made, "layers_block_type")
    if "moe" in words and made["moe"].mlp is None:
        raise SizesError("n_routed_experts must be at least 1 in config.json if a layer is moe.")
    return fields.model(config, tuple(made[word] for word in words))
