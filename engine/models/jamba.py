"""Jamba: Mamba-1 with some attention layers, and experts in place of some MLPs."""

from __future__ import annotations

from engine.layers.blocks import MLP, FeedForward, Mixer
from engine.layers.experts import RoutedExperts, Router
from engine.layers.recurrent import Mamba1
from engine.models.decoder import Decoder
from engine.weights.products import Experts, expert_names
from hybridcache.geometry.mixers import AttentionSizes, MambaSizes
from hybridcache.geometry.sizes import ExpertsSizes, MixerSizes, MLPSizes


class Jamba(Decoder):
    """Decoder without rotation in attention: the state space layers provide positions."""

    model_types = ("jamba",)
    own_keys = "mamba_proj_bias", "mamba_conv_bias", "mamba_dt_rank"
    rope_defaults = None
    step_norms = "input_layernorm", "pre_ff_layernorm"
    norm_name = "model.final_layernorm"

    def mixer(self, name: str, sizes: MixerSizes) -> Mixer:
        own, hidden = self.config.own, self.config.hidden_size
        if isinstance(sizes, AttentionSizes):
            return self.attention(f"{name}.self_attn", sizes, bias=False)
        assert isinstance(sizes, MambaSizes)
        return Mamba1(
            f"{name}.mamba",
            hidden,
            sizes,
            own["mamba_dt_rank"],
            self.build,
            eps=self.config.norm_eps,
            bias=own["mamba_proj_bias"],
            conv_bias=own["mamba_conv_bias"],
        )

    def mlp(self, name: str, sizes: MLPSizes | ExpertsSizes) -> FeedForward:
        hidden, name = self.config.hidden_size, f"{name}.feed_forward"
        if isinstance(sizes, MLPSizes):
            return MLP(name, hidden, sizes.intermediate, self.build)
        router = Router(f"{name}.router", hidden, sizes, self.build, renormalises=False)
        names = expert_names(f"{name}.experts.{{}}", "gate_proj", "up_proj", "down_proj")
        experts = Experts(f"{name}.experts", hidden, sizes, names, self.build)
        return RoutedExperts(router, experts, self.build)
