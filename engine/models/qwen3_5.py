"""Qwen3.5, dense or with experts: Qwen3-Next's layers, with separate input projections in the
linear ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from engine.models.qwen3_next import Qwen3Next
from engine.weights.model_config import Served
from engine.weights.products import Part
from hybridcache.geometry.mixers import DeltaSizes


class Qwen3_5(Qwen3Next):
    """The text part of a Qwen3.5 checkpoint. Its experts are one tensor for gate and up and one for
    down, and their weights always sum to one."""

    model_types = ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")
    served: ClassVar[Served] = {**Qwen3Next.served, "mlp_only_layers": ([], None)}

    def inputs(self, name: str, sizes: DeltaSizes) -> Sequence[Part]:
        heads = sizes.num_value_heads
        return [
            Part(f"{name}.in_proj_qkv", sizes.conv_channels),
            Part(f"{name}.in_proj_z", sizes.value_width),
            Part(f"{name}.in_proj_b", heads),
            Part(f"{name}.in_proj_a", heads),
        ]
