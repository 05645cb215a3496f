"""Falcon-H1: Mamba-2 and attention in parallel in every layer."""

from __future__ import annotations

from hybridcache.geometry.config_format import ROPE_KEYS, Config, Entry, Schema, Values
from hybridcache.geometry.families import fields
from hybridcache.geometry.sizes import LayerSizes, ModelSizes


def complete(values: Values) -> None:
    inner = values.pop("mamba_d_ssm")
    fields.fill_mamba_head_dim(values, inner, "mamba_d_ssm")
    for name, count in (("mlp_multipliers", 2), ("ssm_multipliers", 5)):
        if values[name] is None:
            values[name] = [1.0] * count


FORMATS = {
    "falcon_h1": Schema(
        fields.decoder(
            vocab_size=128000,
            intermediate_size=14336,
            num_key_value_heads=Entry(int | None, 8),
            rms_norm_eps=1e-5,
            max_position_embeddings=8192,
            **fields.MAMBA2,
            mamba_d_ssm=Entry(int | None, 1024),
            mamba_norm_before_gate=True,
            mamba_rms_norm=False,
            projectors_bias=False,
            lm_head_multiplier=1.0,
            embedding_multiplier=1.0,
            mlp_multipliers=Entry(list[float] | None),
            key_multiplier=1.0,
            attention_out_multiplier=1.0,
            attention_in_multiplier=1.0,
            ssm_multipliers=Entry(list[float] | None),
            ssm_in_multiplier=1.0,
            ssm_out_multiplier=1.0,
            attention_bias=False,
            mlp_bias=False,
        ),
        extras={**ROPE_KEYS, "head_dim": int},
        complete=complete,
    )
}


def sizes(config: Config) -> ModelSizes:
    layer = LayerSizes((fields.mamba2(config), fields.attention(config)), fields.dense(config))
    return fields.model(config, (layer,) * fields.num_layers(config))
