"""Falcon-H1: Mamba-2 and attention in parallel after one norm, followed by an MLP; with muP
multipliers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.layers.mamba2 import GatedNorm, Mamba2
from engine.layers.mlp import MLP
from engine.layers.residual import FeedForwardStep, Mixer, MixerStep, Parallel, Scaled
from engine.models.decoder import Decoder, Step
from engine.weights.model_config import (
    ModelConfig,
    ModelError,
    common,
    mixer_of,
    read_rope,
    time_limits,
)
from hybridcache.geometry.config_format import Config
from hybridcache.geometry.mixers import AttentionSizes, MambaSizes
from hybridcache.geometry.sizes import LayerSizes, MixerSizes, ModelSizes


@dataclass(frozen=True, slots=True, kw_only=True)
class FalconH1Config(ModelConfig):
    """Numbers of the family in addition to the sizes."""

    norm: GatedNorm | None
    """Norm before Mamba's output product, or None if there is only the gate."""
    time_limits: tuple[float, float]
    mlp_bias: bool
    mamba_bias: bool
    mamba_output_bias: bool
    conv_bias: bool
    attention_multipliers: tuple[float, float]
    """Multipliers of attention's input and output."""
    key_multiplier: float
    mamba_multipliers: tuple[float, float]
    """Multipliers of Mamba's input and output."""
    state_multipliers: tuple[float, ...]
    """Multipliers of z, x, B, C and dt."""
    mlp_multipliers: tuple[float, float]
    """Multipliers of the gate and of the MLP's output."""


class FalconH1(Decoder):
    """Decoder in which each layer has a state and KV."""

    model_types = ("falcon_h1",)
    norm_name = "model.final_layernorm"
    config: FalconH1Config

    @classmethod
    def read(cls, config: Config, sizes: ModelSizes) -> ModelConfig:
        """Read the config. Raises ModelError for a wrong number of multipliers."""
        for name, count in (("mlp_multipliers", 2), ("ssm_multipliers", 5)):
            if len(config[name]) != count:
                raise ModelError(f"{name} must be {count} numbers in config.json.")
        gate, down = config["mlp_multipliers"]
        shared = common(config, sizes)
        norm = GatedNorm(shared["norm_eps"], gate_first=not config["mamba_norm_before_gate"])
        return FalconH1Config(
            **shared,
            rope=read_rope(config, mixer_of(sizes, AttentionSizes).head_dim),
            embedding_multiplier=config["embedding_multiplier"],
            logit_multiplier=config["lm_head_multiplier"],
            norm=norm if config["mamba_rms_norm"] else None,
            time_limits=time_limits(config),
            mlp_bias=config["mlp_bias"],
            mamba_bias=config["mamba_proj_bias"],
            mamba_output_bias=config["projectors_bias"],
            conv_bias=config["mamba_conv_bias"],
            attention_multipliers=(
                config["attention_in_multiplier"],
                config["attention_out_multiplier"],
            ),
            key_multiplier=config["key_multiplier"],
            mamba_multipliers=(config["ssm_in_multiplier"], config["ssm_out_multiplier"]),
            state_multipliers=tuple(config["ssm_multipliers"]),
            mlp_multipliers=(gate, down),
        )

    def steps(self, name: str, sizes: LayerSizes) -> Sequence[Step]:
        config = self.config
        assert sizes.mlp is not None
        gate, down = config.mlp_multipliers
        mlp = MLP(
            f"{name}.feed_forward",
            config.hidden_size,
            sizes.mlp.intermediate,
            self.build,
            bias=config.mlp_bias,
            gate_multiplier=gate,
        )
        return [
            MixerStep(
                Parallel([self.mixer(name, mixer) for mixer in sizes.mixers]),
                before=self.norm_of(f"{name}.input_layernorm"),
            ),
            FeedForwardStep(mlp, before=self.norm_of(f"{name}.pre_ff_layernorm"), multiplier=down),
        ]

    def mixer(self, name: str, sizes: MixerSizes) -> Mixer:
        config, build = self.config, self.build
        made: Mixer
        if isinstance(sizes, AttentionSizes):
            scale = config.key_multiplier * sizes.head_dim**-0.5
            made = self.attention(f"{name}.self_attn", sizes, scale=scale)
            first, last = config.attention_multipliers
            return Scaled(made, input=first, output=last)
        assert isinstance(sizes, MambaSizes)
        made = Mamba2(
            f"{name}.mamba",
            config.hidden_size,
            sizes,
            build,
            norm=config.norm,
            limits=config.time_limits,
            bias=config.mamba_bias,
            output_bias=config.mamba_output_bias,
            conv_bias=config.conv_bias,
            multipliers=config.state_multipliers,
        )
        first, last = config.mamba_multipliers
        return Scaled(made, input=first, output=last)
