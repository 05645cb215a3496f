"""Falcon-H1: Mamba-2 and attention side by side on one norm, and an MLP behind them; multipliers
(muP) at every turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.run.layers.mamba2 import GatedNorm, Mamba2
from engine.run.layers.mlp import MLP
from engine.run.layers.residual import FeedForwardStep, Mixer, MixerStep, Parallel
from engine.run.layers.scaled import Scaled
from engine.run.model_config import (
    Fields,
    ModelConfig,
    ModelError,
    common,
    mixer_of,
    rope,
    time_limits,
)
from engine.run.models.decoder import Decoder, Step
from hybridcache.geometry.mixers import AttentionSizes, MambaSizes
from hybridcache.geometry.sizes import LayerSizes, MixerSizes


@dataclass(frozen=True, slots=True, kw_only=True)
class FalconH1Config(ModelConfig):
    """What is added to the sizes."""

    norm: GatedNorm | None
    """Before Mamba's output product; None: there is only the gate."""
    time_limits: tuple[float, float]
    mlp_bias: bool
    mamba_bias: bool
    mamba_output_bias: bool
    conv_bias: bool
    attention_multipliers: tuple[float, float]
    """Of what attention reads and gives."""
    key_multiplier: float
    mamba_multipliers: tuple[float, float]
    """Of what Mamba reads and gives."""
    state_multipliers: tuple[float, ...]
    """Of z, x, B, C and dt."""
    mlp_multipliers: tuple[float, float]
    """Of the gate, and of what the MLP gives."""


class FalconH1(Decoder):
    """A layer keeps a state and KV."""

    model_types = ("falcon_h1",)
    norm_name = "model.final_layernorm"
    config: FalconH1Config

    @classmethod
    def read(cls, text: Fields) -> ModelConfig:
        shared = common(text)

        def number(name: str) -> float:
            return float(text.get(name, 1.0))

        def numbers(name: str, count: int) -> tuple[float, ...]:
            values = tuple(float(value) for value in text.get(name) or [1.0] * count)
            if len(values) != count:
                raise ModelError(f"{name} must be {count} numbers in config.json.")
            return values

        gate, down = numbers("mlp_multipliers", 2)
        norm = GatedNorm(
            shared["norm_eps"], gate_first=not text.get("mamba_norm_before_gate", True)
        )
        return FalconH1Config(
            **shared,
            rope=rope(text, mixer_of(shared["sizes"], AttentionSizes).head_dim),
            embedding_multiplier=number("embedding_multiplier"),
            logit_multiplier=number("lm_head_multiplier"),
            norm=norm if text.get("mamba_rms_norm") else None,
            time_limits=time_limits(text),
            mlp_bias=bool(text.get("mlp_bias")),
            mamba_bias=bool(text.get("mamba_proj_bias")),
            mamba_output_bias=bool(text.get("projectors_bias")),
            conv_bias=bool(text.get("mamba_conv_bias", True)),
            attention_multipliers=(
                number("attention_in_multiplier"),
                number("attention_out_multiplier"),
            ),
            key_multiplier=number("key_multiplier"),
            mamba_multipliers=(number("ssm_in_multiplier"), number("ssm_out_multiplier")),
            state_multipliers=numbers("ssm_multipliers", 5),
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
