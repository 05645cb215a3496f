"""Gated activations in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``silu(a) * b`` of the two halves (a, b) of ``x [..., 2I]``: ``[..., I]`` (SwiGLU, Shazeer 2020)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def sigmoid_mul(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """``x * sigmoid(gate)``: the output gate of attention, ``gate`` like x, or of a shared expert, ``gate [..., 1]``."""
    return x * torch.sigmoid(gate)
