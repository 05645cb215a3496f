"""Kimi Linear: Kimi Delta Attention and latent attention."""

from __future__ import annotations

from hybridcache.geometry.families import fields
from hybridcache.geometry.families.fields import Fields
from hybridcache.geometry.mixers import DeltaSizes
from hybridcache.geometry.sizes import LayerSizes, ModelSizes

MODEL_TYPES = ("kimi_linear",)
MARK = "linear_attn_config"


def sizes(text: Fields) -> ModelSizes:
    """``linear_attn_config`` lists the layers of each sort, counted from one."""
    linear = text.get("linear_attn_config") or _as_published(text)
    heads, dim = int(linear["num_heads"]), int(linear["head_dim"])
    kda = DeltaSizes(heads, heads, dim, dim, int(linear.get("short_conv_kernel_size", 4)))
    mla = fields.latent_attention(text)
    mlp = fields.experts(text) or fields.dense(text)
    full = set(linear["full_attn_layers"])
    return fields.model(
        text,
        tuple(
            LayerSizes((mla if layer in full else kda,), mlp)
            for layer in range(1, fields.num_layers(text) + 1)
        ),
    )


def _as_published(text: Fields) -> Fields:
    """``linear_attn_config`` of a config that transformers has written, which says the same in
    other words."""
    types = fields.layer_types(text, ("full_attention", "linear_attention"))
    return {
        "num_heads": text["linear_num_heads"],
        "head_dim": text["linear_head_dim"],
        "short_conv_kernel_size": text["linear_conv_kernel_dim"],
        "full_attn_layers": [rank for rank, sort in enumerate(types, start=1) if "full" in sort],
    }
