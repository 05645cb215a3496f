"""Nemotron-H: every layer is one thing, a Mamba-2 mixer, attention, an MLP or experts."""

from __future__ import annotations

from hybridcache.geometry.families import fields
from hybridcache.geometry.families.fields import Fields
from hybridcache.geometry.mixers import MambaSizes
from hybridcache.geometry.sizes import LayerSizes, ModelSizes, SizesError

MODEL_TYPES = ("nemotron_h",)
MARK = "mamba_num_heads"
WORDS = {
    "M": "mamba",
    "*": "attention",
    "-": "mlp",
    "E": "moe",
    "linear_attention": "mamba",
    "full_attention": "attention",
}
"""Letters of ``hybrid_override_pattern``, and later words, to the first words of
``layers_block_type``."""


def sizes(text: Fields) -> ModelSizes:
    """One letter or one word a layer. Raises SizesError for a sort that is not known."""
    sorts = text.get("layers_block_type") or text["hybrid_override_pattern"]
    heads = fields.check_size("mamba_num_heads", int(text["mamba_num_heads"]))
    groups = fields.check_size("n_groups", int(text["n_groups"]))
    fields.check_multiple("mamba_num_heads", heads, "n_groups", groups)
    mamba = MambaSizes(
        num_heads=heads,
        head_dim=int(text["mamba_head_dim"]),
        state_dim=int(text["ssm_state_size"]),
        num_groups=groups,
        conv_width=int(text["conv_kernel"]),
    )
    made = {
        "mamba": LayerSizes((mamba,)),
        "attention": LayerSizes((fields.attention(text),)),
        "mlp": LayerSizes(mlp=fields.dense(text, matrices=2)),
        "moe": LayerSizes(mlp=fields.experts(text, matrices=2)),
    }
    words = [WORDS.get(sort, sort) for sort in sorts]
    unknown = set(words) - set(made)
    if unknown:
        raise SizesError(f"layers of unknown sort: {', '.join(sorted(unknown))}")
    if "moe" in words and made["moe"].mlp is None:
        raise SizesError("n_routed_experts must be at least 1 in config.json: layers are moe.")
    return fields.model(text, tuple(made[word] for word in words))
