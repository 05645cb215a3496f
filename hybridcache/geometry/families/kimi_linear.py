"""Kimi Linear: Kimi Delta Attention and latent attention."""

from __future__ import annotations

from hybridcache.geometry.families import fields
from hybridcache.geometry.families.fields import Fields
from hybridcache.geometry.mixers import DeltaSizes
from hybridcache.geometry.sizes import (
    ExpertsSizes,
    LayerSizes,
    MLPSizes,
    ModelSizes,
    SizesError,
)

MODEL_TYPES = ("kimi_linear",)
MARK = "linear_attn_config"


def sizes(text: Fields) -> ModelSizes:
    """``linear_attn_config`` lists the layers of each sort, counted from one."""
    linear = text.get("linear_attn_config") or _as_published(text)
    heads, dim = int(linear["num_heads"]), int(linear["head_dim"])
    fields.check_size("num_heads of linear_attn_config", heads)
    kda = DeltaSizes(heads, heads, dim, dim, int(linear.get("short_conv_kernel_size", 4)))
    mla = fields.latent_attention(text)
    full = set(linear["full_attn_layers"])
    layers = [
        LayerSizes((mla if layer in full else kda,), mlp)
        for layer, mlp in enumerate(mlps(text), start=1)
    ]
    return fields.model(text, tuple(layers))


def mlps(text: Fields) -> list[MLPSizes | ExpertsSizes]:
    """Of every layer: the first few, as many as the config says or lists, have no experts."""
    count, experts, dense = fields.num_layers(text), fields.experts(text), fields.dense(text)
    kinds = text.get("mlp_layer_types")
    if kinds is None:
        num_dense = int(text.get("first_k_dense_replace", 1))
        kinds = ["dense"] * num_dense + ["sparse"] * (count - num_dense)
    if len(kinds) < count:
        raise SizesError(f"mlp_layer_types in config.json must name {count} layers.")
    return [experts if experts and kind == "sparse" else dense for kind in kinds[:count]]


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
