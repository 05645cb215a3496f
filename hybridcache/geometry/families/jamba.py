"""Jamba: Mamba-1 with an attention layer now and then, and experts in some layers."""

from __future__ import annotations

from hybridcache.geometry.families import fields
from hybridcache.geometry.families.fields import Fields
from hybridcache.geometry.mixers import MambaSizes
from hybridcache.geometry.sizes import LayerSizes, ModelSizes

MODEL_TYPES = ("jamba",)


def sizes(text: Fields) -> ModelSizes:
    """A layer attends, or has experts, where its number leaves the offset over a period. All
    channels are one head here: nothing but their number means something."""
    mamba = MambaSizes(
        num_heads=1,
        head_dim=int(text.get("mamba_expand") or 2) * fields.hidden(text),
        state_dim=int(text.get("mamba_d_state") or 16),
        num_groups=0,
        conv_width=int(text.get("mamba_d_conv") or 4),
    )
    attention, dense = fields.attention(text), fields.dense(text)
    experts = fields.experts(text) if int(text.get("num_experts") or 1) > 1 else None

    def is_due(word: str, layer: int, period: int, offset: int) -> bool:
        period = int(text.get(f"{word}_layer_period") or period)
        return layer % period == int(text.get(f"{word}_layer_offset", offset))

    return fields.model(
        text,
        tuple(
            LayerSizes(
                (attention if is_due("attn", layer, 8, 4) else mamba,),
                experts if experts is not None and is_due("expert", layer, 2, 1) else dense,
            )
            for layer in range(fields.num_layers(text))
        ),
    )
