"""Falcon-H1: Mamba-2 and attention in parallel after one norm, followed by an MLP; with muP
multipliers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engine.layers.blocks import MLP, FeedForwardStep, Mixer, MixerStep, Parallel
from engine.models.decoder import Decoder, Step
from engine.weights.model_config import ModelConfig, ModelError
from hybridcache.geometry.config_format import Config
from hybridcache.geometry.mixers import AttentionSizes, MambaSizes
from hybridcache.geometry.sizes import LayerSizes, MixerSizes, ModelSizes


class FalconH1(Decoder):
    """Decoder in which each layer has a state and KV."""

    model_types = ("falcon_h1",)
    own_keys = (
        *("mamba_rms_norm", "mamba_norm_before_gate", "time_step_limit"),
        *("mlp_bias", "mamba_proj_bias", "projectors_bias", "mamba_conv_bias"),
        *("attention_in_multiplier", "attention_out_multiplier", "key_multiplier"),
        *("ssm_in_multiplier", "ssm_out_multiplier", "ssm_multipliers", "mlp_multipliers"),
    )
    norm_name = "model.final_layernorm"

    @classmethod
    def read(cls, config: Config, sizes: ModelSizes) -> ModelConfig:
        """Read the config. Raises ModelError for a wrong number of multipliers."""
        for name, count in (("mlp_multipliers", 2), ("ssm_multipliers", 5)):
            if len(config[name]) != count:
                raise ModelError(f"{name} must be {count} numbers in config.json.")
        return replace(
            super().read(config, sizes),
            embedding_multiplier=config["embedding_multiplier"],
            logit_multiplier=config["lm_head_multiplier"],
        )

    def steps(self, name: str, sizes: LayerSizes) -> Sequence[Step]:
        assert sizes.mlp is not None
        own = self.config.own
        gate, down = own["mlp_multipliers"]
        mlp = MLP(
            f"{name}.feed_forward",
            self.config.hidden_size,
            sizes.mlp.intermediate,
            self.build,
            bias=own["mlp_bias"],
            gate_multiplier=gate,
        )
        kinds = ["attention" if isinstance(m, AttentionSizes) else "ssm" for m in sizes.mixers]
        factors = [(own[f"{k}_in_multiplier"], own[f"{k}_out_multiplier"]) for k in kinds]
        return [
            MixerStep(
                Parallel([self.mixer(name, mixer) for mixer in sizes.mixers], factors),
                before=self.norm_of(f"{name}.input_layernorm"),
            ),
            FeedForwardStep(mlp, before=self.norm_of(f"{name}.pre_ff_layernorm"), multiplier=down),
        ]

    def mixer(self, name: str, sizes: MixerSizes) -> Mixer:
        config, own = self.config, self.config.own
        if isinstance(sizes, AttentionSizes):
            scale = own["key_multiplier"] * sizes.head_dim**-0.5
            return self.attention(f"{name}.self_attn", sizes, scale=scale)
        assert isinstance(sizes, MambaSizes)
        return self.mamba2(
            f"{name}.mamba",
            sizes,
            own["mamba_proj_bias"],
            eps=config.norm_eps if own["mamba_rms_norm"] else None,
            gate_first=not own["mamba_norm_before_gate"],
            output_bias=own["projectors_bias"],
            conv_bias=own["mamba_conv_bias"],
            multipliers=tuple(own["ssm_multipliers"]),
        )
