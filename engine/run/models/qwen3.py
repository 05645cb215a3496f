"""Qwen3, dense: attention only. The control that has no states."""

from __future__ import annotations

from engine.run.layers.attention import Attention
from engine.run.layers.gated_delta_net import GatedDeltaNet
from engine.run.models.decoder import Decoder


class Qwen3(Decoder):
    """Attention without a gate, rotary over the whole head, plain norms."""

    centred_norms = False

    def mixer(self, name: str, layer: int) -> Attention | GatedDeltaNet:
        return Attention(
            f"{name}.self_attn",
            self.config,
            self.rank(layer),
            self._build,
            gated=False,
            centred_norms=False,
        )
