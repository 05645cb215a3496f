"""Models that list the type of each layer in ``layer_types``, with an MLP or experts in every
layer. Also used for model types without a module."""

from __future__ import annotations

from collections.abc import Callable

from hybridcache.geometry.families import fields
from hybridcache.geometry.families.fields import Fields
from hybridcache.geometry.sizes import LayerSizes, MixerSizes, ModelSizes, SizesError


def attention(text: Fields) -> MixerSizes:
    return fields.latent_attention(text) if text.get("kv_lora_rank") else fields.attention(text)


READERS: dict[str, Callable[[Fields], MixerSizes]] = {
    "full_attention": attention,
    "attention": attention,
    "linear_attention": fields.gated_delta_net,
    "mamba": fields.mamba2,
}


def sizes(text: Fields) -> ModelSizes:
    """Compute the sizes. Raises SizesError for an unknown layer type."""
    attention(text)
    types = layer_types(text)
    mlp = fields.experts(text) or fields.dense(text)
    mixers = {sort: READERS[sort](text) for sort in set(types)}
    return fields.model(text, tuple(LayerSizes((mixers[sort],), mlp) for sort in types))


def layer_types(text: Fields) -> list[str]:
    """Return one type per layer.

    If ``layer_types`` is missing, every ``full_attention_interval``-th layer is full attention.

    Raises:
        SizesError: a type is unknown, or their number is not the number of layers.
    """
    count, words = fields.num_layers(text), text.get("layer_types")
    if not words:
        interval = int(text.get("full_attention_interval") or 1)
        return [
            ("full_attention", "linear_attention")[(n + 1) % interval > 0] for n in range(count)
        ]
    unknown = set(words) - set(READERS)
    if unknown:
        raise SizesError(f"layer_types has unknown types: {', '.join(sorted(unknown))}.")
    if len(words) != count:
        raise SizesError(f"layer_types in config.json must name {count} layers (got {len(words)}).")
    return list(words)
