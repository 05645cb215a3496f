"""Models that say in ``layer_types`` what each layer is, and have a feed-forward block in every
layer. Those that no other file knows are read here, too."""

from __future__ import annotations

from collections.abc import Callable

from hybridcache.geometry.families import fields
from hybridcache.geometry.families.fields import Fields
from hybridcache.geometry.sizes import LayerSizes, MixerSizes, ModelSizes

MODEL_TYPES = ("", "granitemoehybrid")


def attention(text: Fields) -> MixerSizes:
    return fields.latent_attention(text) if text.get("kv_lora_rank") else fields.attention(text)


READERS: dict[str, Callable[[Fields], MixerSizes]] = {
    "full_attention": attention,
    "attention": attention,
    "linear_attention": fields.gated_delta_net,
    "mamba": fields.mamba2,
}


def sizes(text: Fields) -> ModelSizes:
    """Raises SizesError for a layer of a sort that is not known."""
    attention(text)
    types = fields.layer_types(text, READERS)
    mlp = fields.experts(text) or fields.dense(text)
    mixers = {sort: READERS[sort](text) for sort in set(types)}
    return fields.model(text, tuple(LayerSizes((mixers[sort],), mlp) for sort in types))
