"""Jamba: Mamba-1 with an attention layer at a fixed period, and experts in some layers."""

from __future__ import annotations

import math

from hybridcache.geometry.config_format import Config, Entry, Schema, Values
from hybridcache.geometry.families import fields
from hybridcache.geometry.mixers import MambaSizes
from hybridcache.geometry.sizes import LayerSizes, ModelSizes, SizesError


def complete(values: Values) -> None:
    if values["mamba_dt_rank"] == "auto":
        values["mamba_dt_rank"] = math.ceil(values["hidden_size"] / 16)
    for word in ("attn", "expert"):
        period, offset = (values[f"{word}_layer_{part}"] for part in ("period", "offset"))
        if not 0 <= offset < period:
            raise SizesError(
                f"{word}_layer_offset must be from 0 to {word}_layer_period - 1 in config.json "
                f"(got {offset} of {period})."
            )


FORMATS = {
    "jamba": Schema(
        fields.decoder(
            vocab_size=65536,
            intermediate_size=14336,
            num_key_value_heads=8,
            max_position_embeddings=262144,
            num_experts_per_tok=2,
            num_experts=16,
            expert_layer_period=2,
            expert_layer_offset=1,
            attn_layer_period=8,
            attn_layer_offset=4,
            mamba_d_state=16,
            mamba_d_conv=4,
            mamba_expand=2,
            mamba_dt_rank=Entry(int | str, "auto"),
            mamba_conv_bias=True,
            mamba_proj_bias=False,
        ),
        aliases={"num_local_experts": "num_experts"},
        extras={"head_dim": int},
        complete=complete,
    )
}


def sizes(config: Config) -> ModelSizes:
    """Compute the sizes. All Mamba channels are declared as one head."""
    mamba = MambaSizes(
        num_heads=1,
        head_dim=fields.size_of(config, "mamba_expand") * fields.size_of(config, "hidden_size"),
        state_dim=fields.size_of(config, "mamba_d_state"),
        num_groups=0,
        conv_width=fields.size_of(config, "mamba_d_conv"),
    )
    attention, dense = fields.attention(config), fields.dense(config)
    experts = fields.experts(config) if config["num_experts"] > 1 else None
    if experts is None:
        fields.ignore_experts(config)

    def is_due(word: str, layer: int) -> bool:
        return bool(layer % config[f"{word}_layer_period"] == config[f"{word}_layer_offset"])

    return fields.model(
        config,
        tuple(
            LayerSizes(
                (attention if is_due("attn", layer) else mamba,),
                experts if experts is not None and is_due("expert", layer) else dense,
            )
            for layer in range(fields.num_layers(config))
        ),
    )
