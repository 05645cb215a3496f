"""LFM2, dense or with experts: short convolutions and attention."""

from __future__ import annotations

from hybridcache.geometry.families import fields
from hybridcache.geometry.families.fields import Fields
from hybridcache.geometry.mixers import ShortConvSizes
from hybridcache.geometry.sizes import ExpertsSizes, LayerSizes, MixerSizes, MLPSizes, ModelSizes

MODEL_TYPES = ("lfm2", "lfm2_moe")
KINDS = ("conv", "full_attention")


def sizes(text: Fields) -> ModelSizes:
    """Raises SizesError for a layer of a sort that is not known."""
    width = fields.check_size("conv_L_cache", int(text.get("conv_L_cache", 3)))
    mixers: dict[str, MixerSizes] = {
        "conv": ShortConvSizes(fields.hidden(text), width),
        "full_attention": fields.attention(text),
    }
    layers = [
        LayerSizes((mixers[kind],), mlp) for kind, mlp in zip(kinds(text), mlps(text), strict=True)
    ]
    return fields.model(text, tuple(layers))


def kinds(text: Fields) -> list[str]:
    """A word a layer; the first configs of the family number those that attend."""
    if text.get("layer_types") or text.get("full_attn_idxs") is None:
        return fields.layer_types(text, KINDS)
    attending = set(text["full_attn_idxs"])
    return [KINDS[layer in attending] for layer in range(fields.num_layers(text))]


def mlps(text: Fields) -> list[MLPSizes | ExpertsSizes]:
    """Of every layer: the first ``num_dense_layers`` have no experts."""
    count, experts = fields.num_layers(text), fields.experts(text)
    if experts is None:
        return [MLPSizes(intermediate(text))] * count
    num_dense = min(int(text.get("num_dense_layers", 2)), count)
    return [fields.dense(text)] * num_dense + [experts] * (count - num_dense)


def intermediate(text: Fields) -> int:
    """Two thirds of the number in the config, up to the next multiple, where the config says so."""
    size = int(text.get("block_ff_dim") or text["intermediate_size"])
    if not text.get("block_auto_adjust_ff_dim", True):
        return size
    size = int(2 * size / 3)
    multiplier = text.get("block_ffn_dim_multiplier", 1.0)
    if multiplier is not None:
        multiple = int(text.get("block_multiple_of", 256))
        size = -(-int(multiplier * size) // multiple) * multiple
    return size
