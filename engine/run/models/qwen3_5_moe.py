"""Qwen3.5 with experts: Qwen3.5's mixers, Qwen3-Next's MLPs."""

from __future__ import annotations

from engine.run.models.qwen3_5 import Qwen3_5


class Qwen3_5Moe(Qwen3_5):
    """The text part of a Qwen3.5-MoE checkpoint; its experts come as one tensor each of gate-and-up
    and of down."""
