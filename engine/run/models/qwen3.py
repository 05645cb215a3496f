"""Qwen3, dense: attention only. The control that has no states."""

from __future__ import annotations

from dataclasses import dataclass

from engine.run.layers.attention import Attention
from engine.run.layers.residual import Mixer
from engine.run.model_config import Fields, ModelConfig, ModelError, common, mixer_of, rope
from engine.run.models.decoder import Decoder
from hybridcache.geometry.mixers import AttentionSizes
from hybridcache.geometry.sizes import MixerSizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3Config(ModelConfig):
    """``attention_bias``: of all products of the attention layers."""

    attention_bias: bool


class Qwen3(Decoder):
    """Attention without a gate, rotary over the whole head, plain norms."""

    model_types = ("qwen3",)
    config: Qwen3Config

    @classmethod
    def read(cls, text: Fields) -> ModelConfig:
        """Raises ModelError for sliding windows."""
        if text.get("use_sliding_window"):
            raise ModelError("sliding-window attention is not supported.")
        shared = common(text)
        attention = mixer_of(shared["sizes"], AttentionSizes)
        return Qwen3Config(
            **shared,
            rope=rope(text, attention.head_dim),
            attention_bias=bool(text.get("attention_bias")),
        )

    def mixer(self, name: str, sizes: MixerSizes) -> Mixer:
        assert isinstance(sizes, AttentionSizes)
        attention = f"{name}.self_attn"
        norms = (
            self.norm_of(f"{attention}.q_norm", sizes.head_dim),
            self.norm_of(f"{attention}.k_norm", sizes.head_dim),
        )
        return Attention(
            attention,
            self.config.hidden_size,
            sizes,
            self.build,
            norms=norms,
            bias=self.config.attention_bias,
        )
