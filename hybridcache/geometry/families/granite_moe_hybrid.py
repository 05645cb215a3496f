"""Granite 4: Mamba-2 or attention in each layer, then a shared MLP and, in most models, experts in
parallel."""

from __future__ import annotations

from dataclasses import replace

from hybridcache.geometry.config_format import ROPE_KEYS, Config, Entry, Schema, Values
from hybridcache.geometry.families import fields
from hybridcache.geometry.sizes import MLPSizes, ModelSizes


def complete(values: Values) -> None:
    fields.fill_mamba_head_dim(values, None, "mamba_expand * hidden_size")
    if values["layer_types"] is None:
        values["layer_types"] = ["linear_attention"] * fields.num_layers(values)


FORMATS = {
    "granitemoehybrid": Schema(
        fields.decoder(
            vocab_size=32000,
            intermediate_size=11008,
            num_key_value_heads=Entry(int | None),
            max_position_embeddings=2048,
            attention_bias=False,
            embedding_multiplier=1.0,
            logits_scaling=1.0,
            residual_multiplier=1.0,
            attention_multiplier=1.0,
            num_local_experts=8,
            num_experts_per_tok=2,
            shared_intermediate_size=1024,
            position_embedding_type=Entry(str | None),
            layer_types=Entry(list[str] | None),
            **fields.MAMBA2,
        ),
        aliases={"layers_block_type": "layer_types"},
        extras={**ROPE_KEYS, "head_dim": int},
        complete=complete,
    )
}


def sizes(config: Config) -> ModelSizes:
    shared, experts = fields.size_of(config, "shared_intermediate_size"), fields.experts(config)
    mlp = MLPSizes(shared) if experts is None else replace(experts, shared_intermediate=shared)
    attention, mamba = fields.attention(config), fields.mamba2(config)
    return fields.by_type(config, {"full_attention": attention, "linear_attention": mamba}, mlp)
