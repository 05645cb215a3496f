"""LFM2, dense or with experts: short convolutions and attention."""

from __future__ import annotations

from hybridcache.geometry.config_format import ROPE_KEYS, Config, Entry, Schema, Values, table
from hybridcache.geometry.families import fields
from hybridcache.geometry.mixers import ShortConvSizes
from hybridcache.geometry.sizes import ModelSizes, SizesError

SORTS = ("conv", "full_attention")
SHARED: dict[str, object] = {
    "vocab_size": 65536,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128000,
    "norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "conv_bias": False,
    "conv_L_cache": 3,
    "layer_types": Entry(list[str] | None),
}
EXTRAS = {**ROPE_KEYS, "head_dim": int, "hidden_act": str}


def complete(values: Values) -> None:
    """Build ``layer_types`` from ``full_attn_idxs``, the key of the first published configs."""
    attending = values.pop("full_attn_idxs")
    if values["layer_types"] is None:
        values["layer_types"] = [
            SORTS[attending is None or layer in attending]
            for layer in range(fields.num_layers(values))
        ]
    values["intermediate_size"] = _intermediate(values)


def _intermediate(values: Values) -> int:
    """Return two thirds of the stated size, rounded up to a multiple, if the config says so."""
    size = int(values["intermediate_size"])
    multiplier = values.pop("block_ffn_dim_multiplier")
    multiple = fields.check_size("block_multiple_of", values.pop("block_multiple_of"))
    if not values.pop("block_auto_adjust_ff_dim"):
        return size
    if multiplier <= 0:
        raise SizesError(
            f"block_ffn_dim_multiplier must be greater than 0 in config.json (got {multiplier})."
        )
    return -(-int(multiplier * int(2 * size / 3)) // multiple) * multiple


FORMATS = {
    "lfm2": Schema(
        table(
            **SHARED,
            hidden_size=2560,
            intermediate_size=12288,
            block_multiple_of=256,
            block_ffn_dim_multiplier=1.0,
            block_auto_adjust_ff_dim=True,
            full_attn_idxs=Entry(list[int] | None),
        ),
        aliases={"tie_embedding": "tie_word_embeddings", "block_ff_dim": "intermediate_size"},
        extras=EXTRAS,
        complete=complete,
    ),
    "lfm2_moe": Schema(
        table(
            **SHARED,
            hidden_size=2048,
            intermediate_size=7168,
            moe_intermediate_size=1792,
            num_dense_layers=2,
            num_experts_per_tok=4,
            num_experts=32,
            use_expert_bias=True,
            routed_scaling_factor=1.0,
            norm_topk_prob=True,
        ),
        aliases={"tie_embedding": "tie_word_embeddings"},
        extras=EXTRAS,
    ),
}


def sizes(config: Config) -> ModelSizes:
    hidden = fields.size_of(config, "hidden_size")
    conv = ShortConvSizes(hidden, fields.size_of(config, "conv_L_cache"))
    count, dense, experts = fields.num_layers(config), fields.dense(config), fields.experts(config)
    num_dense = min(max(0, config.get("num_dense_layers", count)), count)
    if "num_experts" in config and experts is None:
        raise SizesError("num_experts must be at least 1 in config.json (got 0).")
    return fields.by_type(
        config,
        {"conv": conv, "full_attention": fields.attention(config)},
        [dense] * num_dense + [experts] * (count - num_dense),
    )
