"""Olmo Hybrid: Gated DeltaNet with steps up to two, and attention with norms after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from engine.layers.blocks import FeedForwardStep, Mixer, MixerStep
from engine.layers.recurrent import GatedDeltaNet
from engine.layers.rotary import RopeDefaults
from engine.models.decoder import Decoder, Step
from engine.weights.products import Part
from hybridcache.geometry.mixers import AttentionSizes, DeltaSizes
from hybridcache.geometry.sizes import LayerSizes, MixerSizes

OUTPUT_EPS = 1e-5
"""Epsilon of the norm after the scan, independent of the config."""


class OlmoHybrid(Decoder):
    """Decoder with norms before the linear layers and after the attention layers.

    Attention norms queries and keys over all heads. The inputs of a linear layer are six matrices
    and three convolutions.
    """

    model_types = ("olmo_hybrid",)
    own_keys = ("linear_allow_neg_eigval",)
    rope_defaults: ClassVar[RopeDefaults] = {"is_optional": True}

    @classmethod
    def published(cls, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Split the convolution over queries, keys and values into three, and rename the norm after
        attention, which transformers names like the norm before the MLP of a linear layer."""
        found: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            layer, _, word = name.partition(".feedforward_layer_norm.")
            attends = bool(word) and f"{layer}.self_attn.q_proj.weight" in tensors
            found[f"{layer}.post_attention_layernorm.{word}" if attends else name] = tensor
        for name in [name for name in found if name.endswith(".linear_attn.q_conv1d.weight")]:
            stem = name.removesuffix("q_conv1d.weight")
            convs = [f"{stem}{word}_conv1d.weight" for word in "qkv"]
            products = [f"{stem}{word}_proj.weight" for word in "qkv"]
            if not all(other in found for other in (*convs, *products)):
                continue
            joined, sizes = torch.cat([found[c] for c in convs]), [len(found[p]) for p in products]
            if sum(sizes) == len(joined):
                found.update(zip(convs, joined.split(sizes), strict=True))
        return found

    def steps(self, name: str, sizes: LayerSizes) -> Sequence[Step]:
        assert sizes.mlp is not None
        mixer, mlp = self.mixer(name, sizes.mixers[0]), self.mlp(name, sizes.mlp)
        if isinstance(sizes.mixers[0], DeltaSizes):
            return [
                MixerStep(mixer, before=self.norm_of(f"{name}.attention_layer_norm")),
                FeedForwardStep(mlp, before=self.norm_of(f"{name}.feedforward_layer_norm")),
            ]
        return [
            MixerStep(mixer, after=self.norm_of(f"{name}.post_attention_layernorm")),
            FeedForwardStep(mlp, after=self.norm_of(f"{name}.post_feedforward_layernorm")),
        ]

    def mixer(self, name: str, sizes: MixerSizes) -> Mixer:
        if isinstance(sizes, AttentionSizes):
            name = f"{name}.self_attn"
            queries, keys = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
            norms = self.norm_of(f"{name}.q_norm", queries), self.norm_of(f"{name}.k_norm", keys)
            return self.attention(name, sizes, norms=norms)
        assert isinstance(sizes, DeltaSizes)
        name, heads = f"{name}.linear_attn", sizes.num_value_heads
        qkv = {"q": sizes.key_width, "k": sizes.key_width, "v": sizes.value_width}
        widths = qkv | {"g": sizes.value_width, "b": heads, "a": heads}
        return GatedDeltaNet(
            name,
            self.config.hidden_size,
            sizes,
            [Part(f"{name}.{word}_proj", width) for word, width in widths.items()],
            self.build,
            eps=OUTPUT_EPS,
            convs={f"{word}_conv1d": width for word, width in qkv.items()},
            output="o_proj",
            norm="o_norm",
            max_beta=2.0 if self.config.own["linear_allow_neg_eigval"] else 1.0,
        )
