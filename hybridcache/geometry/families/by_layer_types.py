"""Models that list the type of each layer in ``layer_types``, with an MLP or experts in every
layer. Also used for model types without a module."""

from __future__ import annotations

from collections.abc import Callable

from hybridcache.geometry.families import fields
from hybridcache.geometry.families.fields import Fields
from hybridcache.geometry.sizes import LayerSizes, MixerSizes, ModelSizes


def attention(text: Fields) -> MixerSizes:
    return fields.latent_attention(text) if text.get("kv_lora_rank") else fields.attention(text)


READERS: dict[str, Callable[[Fields], MixerSizes]] = {
    "full_attention": attention,
    "attention": attention,
    "linear_attention": fields.gated_delta_net,
    "mamba": fields.mamba2,
}


def sizes(text: Fields) -> ModelSizes:
    """Compute the sizes. If ``layer_types`` is missing, every ``full_attention_interval``-th layer
    is full attention. Raises SizesError for an unknown layer type."""
    attention(text)
    if text.get("layer_types"):
        types = fields.sorts(text, READERS)
    else:
        types = fields.every_nth_attends(text, int(text.get("full_attention_interval") or 1))
    mlp = fields.experts(text) or fields.dense(text)
    mixers = {sort: READERS[sort](text) for sort in set(types)}
    return fields.model(text, tuple(LayerSizes((mixers[sort],), mlp) for sort in types))
