"""Qwen3.5, dense: Qwen3-Next's mixers with plain MLPs, input projections of the linear layers split
by kind."""

from __future__ import annotations

from engine.run.layers.gated_delta_net import Layout
from engine.run.models.qwen3_next import Qwen3Next


class Qwen3_5(Qwen3Next):
    """The text part of a Qwen3.5 checkpoint."""

    layout: Layout = "split"
