"""Olmo Hybrid: Gated DeltaNet and attention, dense."""

from __future__ import annotations

from hybridcache.geometry.families import fields
from hybridcache.geometry.families.fields import Fields
from hybridcache.geometry.sizes import LayerSizes, MixerSizes, ModelSizes

MODEL_TYPES = ("olmo_hybrid",)
SORTS = "linear_attention", "full_attention"


def sizes(text: Fields) -> ModelSizes:
    """Heads of the linear layers are as many as the others where nothing is said, keys three
    quarters of the width and values twice as wide."""
    attention, mlp = fields.attention(text), fields.dense(text)
    heads = int(text.get("linear_num_key_heads") or attention.num_heads)
    key_dim = int(text.get("linear_key_head_dim") or 0.75 * fields.hidden(text) / heads)
    said = {
        "linear_num_key_heads": heads,
        "linear_num_value_heads": text.get("linear_num_value_heads") or attention.num_heads,
        "linear_key_head_dim": key_dim,
        "linear_value_head_dim": text.get("linear_value_head_dim") or 2 * key_dim,
        "linear_conv_kernel_dim": text.get("linear_conv_kernel_dim") or 4,
    }
    linear = fields.gated_delta_net(said)
    types = fields.layer_types(text, SORTS, default_interval=4)
    mixers: dict[str, MixerSizes] = {"linear_attention": linear, "full_attention": attention}
    return fields.model(text, tuple(LayerSizes((mixers[sort],), mlp) for sort in types))
