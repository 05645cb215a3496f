"""Kimi Linear: three layers of Kimi Delta Attention for each one of latent attention, without
rotation.

The experts include a shared one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

import torch

from engine.layers.attention import LatentAttention
from engine.layers.blocks import MLP, FeedForward, Mixer, RMSNorm
from engine.layers.experts import RoutedExperts
from engine.layers.recurrent import KimiDeltaAttention
from engine.models.decoder import Decoder
from engine.weights.model_config import ModelConfig, ModelError, Served
from engine.weights.products import Experts, expert_names
from hybridcache.geometry.config_format import Config
from hybridcache.geometry.mixers import DeltaSizes, LatentAttentionSizes
from hybridcache.geometry.sizes import ExpertsSizes, MixerSizes, MLPSizes, ModelSizes

DENSE_MLP = re.compile(r"\.block_sparse_moe\.((gate|up|down)_proj\.)")
LATENT_NORM_EPS = 1e-6
"""Epsilon of the latent's norm, independent of the config."""


class KimiLinear(Decoder):
    """Decoder with the names of the published checkpoint: ``mlp`` in dense layers,
    ``block_sparse_moe`` in layers with experts."""

    model_types = ("kimi_linear",)
    own_keys = "norm_topk_prob", "routed_scaling_factor"
    served: ClassVar[Served] = {
        "moe_router_activation_func": ("sigmoid",),
        "moe_layer_freq": (1,),
        "q_lora_rank": (None,),
        "linear_attn_config": ({},),
        "mla_use_nope": (True,),
        "n_group": (1,),
        "topk_group": (1,),
    }
    rope_defaults = None

    @classmethod
    def read(cls, config: Config, sizes: ModelSizes) -> ModelConfig:
        """Read the config. Raises ModelError for groups of heads."""
        if config["num_key_value_heads"] != config["num_attention_heads"]:
            raise ModelError(
                "num_key_value_heads must be num_attention_heads in config.json: latent attention "
                "has no groups of heads."
            )
        return super().read(config, sizes)

    @classmethod
    def published(cls, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename the MLP of dense layers, to which transformers gives the name of the experts."""
        return {DENSE_MLP.sub(r".mlp.\1", name): tensor for name, tensor in tensors.items()}

    def mixer(self, name: str, sizes: MixerSizes) -> Mixer:
        config, build, attention = self.config, self.build, f"{name}.self_attn"
        if isinstance(sizes, DeltaSizes):
            norm = self.norm_of(f"{attention}.o_norm", sizes.value_dim)
            return KimiDeltaAttention(attention, config.hidden_size, sizes, build, norm)
        assert isinstance(sizes, LatentAttentionSizes)
        norm = RMSNorm(f"{attention}.kv_a_layernorm", sizes.rank, build, eps=LATENT_NORM_EPS)
        return LatentAttention(
            attention, config.hidden_size, sizes, build, norm, bias=config.attention_bias
        )

    def mlp(self, name: str, sizes: MLPSizes | ExpertsSizes) -> FeedForward:
        if isinstance(sizes, MLPSizes):
            return super().mlp(name, sizes)
        hidden, name = self.config.hidden_size, f"{name}.block_sparse_moe"
        router = self.sigmoid_router(name, sizes, "gate.e_score_correction_bias")
        names, shared = expert_names(f"{name}.experts.{{}}", "w1", "w3", "w2"), None
        if sizes.shared_intermediate:
            shared = MLP(f"{name}.shared_experts", hidden, sizes.shared_intermediate, self.build)
        experts = Experts(f"{name}.experts", hidden, sizes, names, self.build)
        return RoutedExperts(router, experts, self.build, shared=shared)
