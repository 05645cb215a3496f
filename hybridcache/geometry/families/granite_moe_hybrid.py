"""Granite 4: Mamba-2 or attention in a layer, behind it an MLP that every token meets and, in most
models, experts beside it."""

from __future__ import annotations

from dataclasses import replace

from hybridcache.geometry.families import fields
from hybridcache.geometry.families.fields import Fields
from hybridcache.geometry.sizes import LayerSizes, MixerSizes, MLPSizes, ModelSizes

MODEL_TYPES = ("granitemoehybrid",)
SORTS = {
    "attention": "attention",
    "full_attention": "attention",
    "mamba": "mamba",
    "linear_attention": "mamba",
}


def sizes(text: Fields) -> ModelSizes:
    """Raises SizesError for a layer of a sort that is not known."""
    count = fields.num_layers(text)
    types = fields.layer_types({"layer_types": ["mamba"] * count} | dict(text), SORTS)
    shared = int(text["shared_intermediate_size"])
    experts = fields.experts(text)
    mlp = MLPSizes(shared) if experts is None else replace(experts, shared_intermediate=shared)
    made: dict[str, MixerSizes] = {"attention": fields.attention(text)}
    if "mamba" in map(SORTS.get, types):
        made["mamba"] = fields.mamba2(text)
    return fields.model(text, tuple(LayerSizes((made[SORTS[sort]],), mlp) for sort in types))
