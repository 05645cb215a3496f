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

    def mixer(self, name: str, layer: int) -> Attention | GatedDeltaNet:
        config, rank, build = self.config, self.rank(layer), self._build
        if config.layer_types[layer] == "full_attention":
            return Attention(
                f"{name}.self_attn", config, rank, build, gated=True, centred_norms=True
            )
        return GatedDeltaNet(f"{name}.linear_attn", config, rank, build, layout=self.layout)

    def mlp(self, name: str, layer: int) -> MLP | ExpertsMLP:
        config = self.config
        if not config.expert_layers[layer]:
            return super().mlp(name, layer)
        assert config.experts is not None
        return ExpertsMLP(
            f"{name}.mlp",
            config.hidden_size,
            config.experts,
            self._build,
            stacked_names=self.stacked_experts,
        )
