"""LFM2, dense or with experts: short convolutions, and some attention layers with normed heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from engine.layers.blocks import MLP, FeedForward, Mixer, StepPart
from engine.layers.experts import RoutedExperts
from engine.layers.recurrent import CausalConv, Recurrent
from engine.layers.rotary import RopeDefaults
from engine.models.decoder import Decoder
from engine.weights.parameters import Build
from engine.weights.products import Experts, Linear, Part, expert_names
from hybridcache.geometry.mixers import AttentionSizes, ShortConvSizes
from hybridcache.geometry.sizes import ExpertsSizes, MixerSizes, MLPSizes


class ShortConv(Recurrent):
    """``out(C * conv(B * x))``; B, C and x are one product ``[B | C | x]``."""

    def __init__(
        self, name: str, hidden_size: int, sizes: ShortConvSizes, build: Build, *, bias: bool
    ) -> None:
        """``bias``: True if both products and the convolution have one."""
        channels, conv = (sizes.channels, 1), {f"{name}.conv": sizes.channels}
        inputs = [Part(f"{name}.in_proj", 3 * sizes.channels)]
        outputs = [Part(f"{name}.out_proj", hidden_size)]
        self._projection = Linear(hidden_size, inputs, build, outputs=[channels] * 3, bias=bias)
        self._output = Linear(sizes.channels, outputs, build, bias=bias, sums=True)
        self.layers = self._projection, self._output
        sizes = build.own(sizes)
        self.keeps = sizes.keeps
        width = sizes.channels
        self.projected_size, self.mixed_shape = 3 * width, (width,)
        self._conv = CausalConv(width, sizes.conv_width, build, bias=bias, silu=False)
        self.own = [*self._conv.parameters(conv, [channels])]

    def _inputs(self, projected: torch.Tensor) -> Sequence[torch.Tensor]:
        gate, _, x = projected.chunk(3, dim=-1)
        return [gate * x]

    def _scan(
        self, x: torch.Tensor, gates: Sequence[torch.Tensor], part: StepPart, *states: torch.Tensor
    ) -> torch.Tensor:
        return x

    def _gated(self, mixed: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        return projected.chunk(3, dim=-1)[1] * mixed


class Lfm2(Decoder):
    """Decoder with the last norm named after the embedding."""

    model_types = ("lfm2", "lfm2_moe")
    own_keys = "conv_bias", "use_expert_bias", "norm_topk_prob", "routed_scaling_factor"
    eps_key = "norm_eps"
    rope_defaults: ClassVar[RopeDefaults] = {"theta": 1e6}
    step_norms = "operator_norm", "ffn_norm"
    norm_name = "model.embedding_norm"

    def mixer(self, name: str, sizes: MixerSizes) -> Mixer:
        if isinstance(sizes, ShortConvSizes):
            name, bias = f"{name}.conv", self.config.own["conv_bias"]
            return ShortConv(name, self.config.hidden_size, sizes, self.build, bias=bias)
        assert isinstance(sizes, AttentionSizes)
        name, size = f"{name}.self_attn", sizes.head_dim
        norms = self.norm_of(f"{name}.q_layernorm", size), self.norm_of(f"{name}.k_layernorm", size)
        return self.attention(name, sizes, norms=norms, output="out_proj")

    def mlp(self, name: str, sizes: MLPSizes | ExpertsSizes) -> FeedForward:
        own, hidden, name = self.config.own, self.config.hidden_size, f"{name}.feed_forward"
        if isinstance(sizes, MLPSizes):
            inputs, output = ("w1", "w3"), "w2"
            return MLP(name, hidden, sizes.intermediate, self.build, inputs=inputs, output=output)
        bias = "expert_bias" if own["use_expert_bias"] else None
        router = self.sigmoid_router(name, sizes, bias, eps=1e-6)
        names = expert_names(f"{name}.experts.{{}}", "w1", "w3", "w2")
        experts = Experts(f"{name}.experts", hidden, sizes, names, self.build)
        return RoutedExperts(router, experts, self.build)
