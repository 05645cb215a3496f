"""Qwen3-Next: three Gated DeltaNet layers to one of gated attention, experts with a shared one in
every layer."""

from __future__ import annotations

from engine.run.layers.attention import Attention
from engine.run.layers.gated_delta_net import GatedDeltaNet, Layout
from engine.run.layers.mlp import MLP, ExpertsMLP
from engine.run.models.decoder import Decoder


class Qwen3Next(Decoder):
    """Input projections of the linear layers come interleaved by key head, experts one by one."""

    layout: Layout = "interleaved"

    def mixer(self, layer: int) -> tuple[str, Attention | GatedDeltaNet]:
        config, rank = self.config, self.rank(layer)
        if config.layer_types[layer] == "full_attention":
            return "self_attn", Attention(
                config, rank, self._kernels, self._place, gated=True, centred_norms=True
            )
        return "linear_attn", GatedDeltaNet(
            config, rank, self._kernels, self._place, layout=self.layout
        )

    def mlp(self, layer: int) -> MLP | ExpertsMLP:
        config = self.config
        if not config.expert_layers[layer]:
            return super().mlp(layer)
        assert config.experts is not None
        return ExpertsMLP(
            config.hidden_size,
            config.experts,
            self._kernels,
            self._place,
            stacked_names=self.stacked_experts,
        )
