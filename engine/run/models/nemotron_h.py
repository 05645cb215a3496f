"""Nemotron-H: every layer is one block, a Mamba-2 mixer, attention, an MLP or experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from engine.run.layers.attention import Attention
from engine.run.layers.mamba2 import GatedNorm, Mamba2
from engine.run.layers.mlp import SquaredReluMLP
from engine.run.layers.residual import FeedForward, FeedForwardStep, Mixer, MixerStep
from engine.run.model_config import Fields, ModelConfig, check_only, common
from engine.run.models.decoder import Decoder, Step
from hybridcache.geometry.mixers import AttentionSizes, MambaSizes
from hybridcache.geometry.sizes import ExpertsSizes, LayerSizes, MixerSizes, MLPSizes


@dataclass(frozen=True, slots=True, kw_only=True)
class NemotronHConfig(ModelConfig):
    """``mamba_bias``, ``conv_bias``, ``mlp_bias``: which products have one. ``least_step``: of
    Mamba's time steps."""

    mamba_bias: bool
    conv_bias: bool
    mlp_bias: bool
    least_step: float


class NemotronH(Decoder):
    """Attention rotates nothing: positions come from the state space layers."""

    model_types = ("nemotron_h",)
    embedding_name = "backbone.embeddings"
    layers_name = "backbone.layers"
    norm_name = "backbone.norm_f"
    config: NemotronHConfig

    @classmethod
    def read(cls, text: Fields) -> ModelConfig:
        check_only(text, mlp_hidden_act="relu2", mamba_hidden_act="silu", sliding_window=None)
        shared = common(text)
        shared["norm_eps"] = float(text.get("layer_norm_epsilon", 1e-5))
        return NemotronHConfig(
            **shared,
            rope=None,
            mamba_bias=bool(text.get("use_bias")),
            conv_bias=bool(text.get("use_conv_bias", True)),
            mlp_bias=bool(text.get("mlp_bias")),
            least_step=float(text.get("time_step_min", 0.001)),
        )

    def steps(self, name: str, sizes: LayerSizes) -> Sequence[Step]:
        before, block = self.norm_of(f"{name}.norm"), f"{name}.mixer"
        if sizes.mixers:
            return [MixerStep(self.mixer(block, sizes.mixers[0]), before=before)]
        assert sizes.mlp is not None
        return [FeedForwardStep(self.mlp(block, sizes.mlp), before=before)]

    def mixer(self, name: str, sizes: MixerSizes) -> Mixer:
        config = self.config
        if isinstance(sizes, AttentionSizes):
            return Attention(name, config.hidden_size, sizes, self.build, rotates=False)
        assert isinstance(sizes, MambaSizes)
        return Mamba2(
            name,
            config.hidden_size,
            sizes,
            self.build,
            norm=GatedNorm(config.norm_eps, gate_first=True),
            limits=(config.least_step, math.inf),
            bias=config.mamba_bias,
            output_bias=config.mamba_bias,
            conv_bias=config.conv_bias,
        )

    def mlp(self, name: str, sizes: MLPSizes | ExpertsSizes) -> FeedForward:
        config = self.config
        return SquaredReluMLP(
            name, config.hidden_size, sizes.intermediate, self.build, bias=config.mlp_bias
        )
