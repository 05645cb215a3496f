"""Olmo Hybrid: Gated DeltaNet and attention, dense."""

from __future__ import annotations

from hybridcache.geometry.config_format import ROPE_KEYS, Config, Entry, Schema, Values
from hybridcache.geometry.families import fields
from hybridcache.geometry.sizes import ModelSizes


def complete(values: Values) -> None:
    """Fill in the sizes of the linear layers.

    They have as many heads as the attention layers. Keys have three quarters of the model's width,
    and values are twice as wide as keys.
    """
    interval = min(fields.num_layers(values), 4)  # there is one layer of attention at least
    if values["layer_types"] is None:
        values["layer_types"] = fields.every_nth_attends(values, interval)
    for name in ("linear_num_key_heads", "linear_num_value_heads"):
        if values[name] is None:
            values[name] = values["num_attention_heads"]
    if values["linear_key_head_dim"] is None:
        heads = fields.check_size("linear_num_key_heads", values["linear_num_key_heads"])
        values["linear_key_head_dim"] = int(0.75 * values["hidden_size"] / heads)
    if values["linear_value_head_dim"] is None:
        values["linear_value_head_dim"] = 2 * values["linear_key_head_dim"]


FORMATS = {
    "olmo_hybrid": Schema(
        fields.decoder(
            vocab_size=100352,
            hidden_size=3840,
            intermediate_size=11008,
            num_attention_heads=30,
            num_key_value_heads=Entry(int | None),
            max_position_embeddings=65536,
            attention_bias=False,
            layer_types=Entry(list[str] | None),
            linear_num_key_heads=Entry(int | None),
            linear_num_value_heads=Entry(int | None),
            linear_key_head_dim=Entry(int | None),
            linear_value_head_dim=Entry(int | None),
            linear_conv_kernel_dim=4,
            linear_allow_neg_eigval=True,
        ),
        extras={**ROPE_KEYS, "head_dim": int},
        complete=complete,
    )
}


def sizes(config: Config) -> ModelSizes:
    attention, mlp = fields.attention(config), fields.dense(config)
    linear = fields.gated_delta_net(config)
    return fields.by_type(config, {"linear_attention": linear, "full_attention": attention}, mlp)
