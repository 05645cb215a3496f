"""Falcon-H1: Mamba-2 and attention side by side in every layer."""

from __future__ import annotations

from hybridcache.geometry.families import fields
from hybridcache.geometry.families.fields import Fields
from hybridcache.geometry.sizes import LayerSizes, ModelSizes

MODEL_TYPES = ("falcon_h1",)


def sizes(text: Fields) -> ModelSizes:
    layer = LayerSizes((fields.mamba2(text), fields.attention(text)), fields.dense(text))
    return fields.model(text, (layer,) * fields.num_layers(text))
