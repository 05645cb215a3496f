"""Qwen3-Next and Qwen3.5: Gated DeltaNet and gated attention, dense or with experts."""

from __future__ import annotations

from hybridcache.geometry.families import fields
from hybridcache.geometry.families.fields import Fields
from hybridcache.geometry.sizes import LayerSizes, ModelSizes

MODEL_TYPES = ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")
SORTS = "linear_attention", "full_attention"


def sizes(text: Fields) -> ModelSizes:
    """Raises SizesError for a layer of a sort that is not known."""
    attention = fields.attention(text, gated=True)
    types = fields.layer_types(text, SORTS, default_interval=4)
    linear = fields.gated_delta_net(text) if "linear_attention" in types else None
    dense, experts = fields.dense(text), fields.experts(text)
    always_dense = set(text.get("mlp_only_layers") or ())
    step = int(text.get("decoder_sparse_step") or 1)
    layers = []
    for layer, sort in enumerate(types):
        mixer = linear if linear is not None and sort == "linear_attention" else attention
        sparse = layer not in always_dense and (layer + 1) % step == 0
        mlp = experts if experts is not None and sparse else dense
        layers.append(LayerSizes((mixer,), mlp))
    return fields.model(text, tuple(layers))
