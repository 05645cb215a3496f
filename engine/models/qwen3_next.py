"""Qwen3-Next: three Gated DeltaNet layers for each one of gated attention, and experts with a
shared one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from engine.layers.blocks import MLP, FeedForward, FeedForwardStep, Mixer, MixerStep
from engine.layers.experts import Gating, RoutedExperts
from engine.layers.prediction import PredictionHead
from engine.layers.recurrent import GatedDeltaNet
from engine.layers.rotary import RopeDefaults
from engine.models.decoder import Decoder
from engine.weights.model_config import Served, mixer_of
from engine.weights.products import Experts, Part, expert_names
from hybridcache.geometry.mixers import AttentionSizes, DeltaSizes
from hybridcache.geometry.sizes import ExpertsSizes, LayerSizes, MixerSizes, MLPSizes


class Qwen3Next(Decoder):
    """Decoder with linear inputs interleaved by key head, and separate experts."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_next",)
    own_keys = ("norm_topk_prob",)
    served: ClassVar[Served] = {"attn_output_gate": (True,)}
    rope_defaults: ClassVar[RopeDefaults] = {"fraction": 0.25}
    centred_norms = True

    def mixer(self, name: str, sizes: MixerSizes) -> Mixer:
        if isinstance(sizes, AttentionSizes):
            name = f"{name}.self_attn"
            return self.attention(name, sizes, norms=self.head_norms(name, sizes))
        assert isinstance(sizes, DeltaSizes)
        name, config = f"{name}.linear_attn", self.config
        inputs = self.inputs(name, sizes)
        return GatedDeltaNet(
            name, config.hidden_size, sizes, inputs, self.build, eps=config.norm_eps
        )

    def inputs(self, name: str, sizes: DeltaSizes) -> Sequence[Part]:
        """Return the parts of the input product. Queries, keys, values and z are one matrix, b and
        a another, interleaved by key head."""
        group = sizes.num_value_heads // sizes.num_key_heads
        values = group * sizes.value_dim
        qkvz = _by_kind(sizes, [sizes.key_dim, sizes.key_dim, values, values])
        ba = _by_kind(sizes, [group, group])
        return [
            Part(f"{name}.in_proj_qkvz", len(qkvz), qkvz),
            Part(f"{name}.in_proj_ba", len(ba), ba),
        ]

    def mlp(self, name: str, sizes: MLPSizes | ExpertsSizes) -> FeedForward:
        if isinstance(sizes, MLPSizes):
            return super().mlp(name, sizes)
        hidden, build, name = self.config.hidden_size, self.build, f"{name}.mlp"
        words, stem = ("gate_proj", "up_proj", "down_proj"), f"{name}.experts"
        names: tuple[str, ...] = f"{stem}.gate_up_proj", f"{stem}.down_proj"
        if not self.stacked_experts:
            names = expert_names(f"{stem}.{{}}", *words)
        shared_name, shared = f"{name}.shared_expert", None
        shared_names = expert_names(shared_name, *words)
        experts = Experts(stem, hidden, sizes, names, build, shared=shared_names)
        if not experts.has_shared:
            shared = MLP(shared_name, hidden, sizes.shared_intermediate, build)
        renormalises = self.config.own.get("norm_topk_prob", True)
        gate = f"{shared_name}_gate"
        router = Gating(f"{name}.gate", hidden, sizes, build, renormalises=renormalises, gate=gate)
        return RoutedExperts(router, experts, build, shared=shared)

    def prediction_head(self) -> PredictionHead:
        """Return the head ``mtp``: a layer of attention, with experts if the model has any."""
        sizes = self.config.sizes
        mlps = [layer.mlp for layer in sizes.layers]
        mlp = next((mlp for mlp in mlps if isinstance(mlp, ExpertsSizes)), mlps[-1])
        layer = LayerSizes((mixer_of(sizes, AttentionSizes),), mlp)
        attention, feed_forward = self.steps("mtp.layers.0", layer)
        assert isinstance(attention, MixerStep) and isinstance(feed_forward, FeedForwardStep)
        words = "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"
        embedding, hidden, last = (self.norm_of(f"mtp.{word}") for word in words)
        return PredictionHead(
            "mtp",
            self.config.hidden_size,
            self.build,
            norms=(embedding, hidden, last),
            attention=attention,
            mlp=feed_forward,
        )


def _by_kind(sizes: DeltaSizes, widths: list[int]) -> torch.Tensor:
    """Return the order that groups the rows by kind, for a matrix with ``widths`` next to each
    other for every key head."""
    heads = sizes.num_key_heads
    rows = torch.arange(heads * sum(widths)).view(heads, sum(widths))
    return torch.cat([part.flatten() for part in rows.split(widths, dim=1)])
