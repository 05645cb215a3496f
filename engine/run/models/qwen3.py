"""Qwen3, dense: attention only. The control that has no states."""

from __future__ import annotations

from engine.run.layers.residual import Mixer
from engine.run.model_config import Fields, ModelConfig, ModelError
from engine.run.models.decoder import Decoder
from hybridcache.geometry.mixers import AttentionSizes
from hybridcache.geometry.sizes import MixerSizes


class Qwen3(Decoder):
    """Attention without a gate, rotary over the whole head, plain norms."""

    model_types = ("qwen3",)

    @classmethod
    def read(cls, text: Fields) -> ModelConfig:
        """Raises ModelError for sliding windows."""
        sorts = text.get("layer_types") or ()
        if text.get("use_sliding_window") or "sliding_attention" in sorts:
            raise ModelError("sliding-window attention is not supported.")
        return super().read(text)

    def mixer(self, name: str, sizes: MixerSizes) -> Mixer:
        assert isinstance(sizes, AttentionSizes)
        name = f"{name}.self_attn"
        return self.attention(name, sizes, norms=self.head_norms(name, sizes))
