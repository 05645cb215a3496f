"""Granite 4: Mamba-2 with some attention layers, multipliers, and an MLP in every layer.

Most models have experts in addition to the MLP.
"""

from __future__ import annotations

from dataclasses import replace

from engine.layers.blocks import MLP, FeedForward, Mixer
from engine.layers.experts import Gating, RoutedExperts
from engine.layers.rotary import read_rope
from engine.models.decoder import Decoder
from engine.weights.model_config import ModelConfig, mixer_of, read_settings
from engine.weights.products import Experts, expert_names
from hybridcache.geometry.config_format import ROPE_KEYS, Config
from hybridcache.geometry.mixers import AttentionSizes, MambaSizes
from hybridcache.geometry.sizes import ExpertsSizes, MixerSizes, MLPSizes, ModelSizes


class GraniteMoeHybrid(Decoder):
    """Decoder in which experts are two tensors for all, or one by one as ``engine convert`` writes
    them; gate and up of every MLP are one matrix."""

    model_types = ("granitemoehybrid",)
    own_keys = (
        *("mamba_proj_bias", "mamba_conv_bias", "time_step_limit"),
        *("attention_multiplier", "residual_multiplier"),
    )

    @classmethod
    def read(cls, config: Config, sizes: ModelSizes) -> ModelConfig:
        rope = None
        if config["position_embedding_type"] == "rope":
            rope = read_rope(config, mixer_of(sizes, AttentionSizes).head_dim)
        config.ignore(*ROPE_KEYS, "intermediate_size", "num_experts_per_tok")
        return replace(
            read_settings(config, sizes, rope, cls.own_keys, eps=cls.eps_key),
            embedding_multiplier=config["embedding_multiplier"],
            logit_multiplier=1.0 / config["logits_scaling"],
        )

    def mixer(self, name: str, sizes: MixerSizes) -> Mixer:
        own = self.config.own
        if isinstance(sizes, AttentionSizes):
            return self.attention(f"{name}.self_attn", sizes, scale=own["attention_multiplier"])
        assert isinstance(sizes, MambaSizes)
        bias, conv_bias = own["mamba_proj_bias"], own["mamba_conv_bias"]
        return self.mamba2(f"{name}.mamba", sizes, bias, conv_bias=conv_bias)

    def mlp(self, name: str, sizes: MLPSizes | ExpertsSizes) -> FeedForward:
        if isinstance(sizes, MLPSizes):
            return self.shared(name, sizes.intermediate)
        hidden, stem = self.config.hidden_size, f"{name}.block_sparse_moe"
        router = Gating(f"{stem}.router.layer", hidden, sizes, self.build, renormalises=True)
        each = stem if self.stacked_experts else f"{stem}.experts.{{}}"
        names = expert_names(each, "input_linear", "output_linear")
        shared = self.shared(name, sizes.shared_intermediate)
        experts = Experts(stem, hidden, sizes, names, self.build)
        return RoutedExperts(router, experts, self.build, shared=shared)

    def shared(self, name: str, intermediate_size: int) -> MLP:
        """Return the MLP that computes every token."""
        return MLP(
            f"{name}.shared_mlp",
            self.config.hidden_size,
            intermediate_size,
            self.build,
            inputs=["input_linear"],
            output="output_linear",
        )
