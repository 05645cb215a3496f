"""Qwen3, dense: attention only. Serves as the control without states."""

from __future__ import annotations

from engine.layers.blocks import Mixer
from engine.models.decoder import Decoder
from engine.weights.model_config import ModelConfig, ModelError
from hybridcache.geometry.config_format import Config
from hybridcache.geometry.mixers import AttentionSizes
from hybridcache.geometry.sizes import MixerSizes, ModelSizes


class Qwen3(Decoder):
    """Decoder with rotation of whole heads, plain norms and no gates."""

    model_types = ("qwen3",)

    @classmethod
    def read(cls, config: Config, sizes: ModelSizes) -> ModelConfig:
        """Read the config. Raises ModelError for sliding windows."""
        if "sliding_attention" in config["layer_types"]:
            raise ModelError(
                "sliding-window attention is not supported: use_sliding_window must be false in "
                "config.json, and layer_types must name none."
            )
        return super().read(config, sizes)

    def mixer(self, name: str, sizes: MixerSizes) -> Mixer:
        assert isinstance(sizes, AttentionSizes)
        name = f"{name}.self_attn"
        return self.attention(name, sizes, norms=self.head_norms(name, sizes))
