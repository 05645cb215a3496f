"""Gated activations in plain PyTorch.

Written with exp rather than ``torch.sigmoid`` and ``F.silu``: on AVX-512 those give the elements
behind the last full vector other bits, so a row's result would depend on where it lies; exp and
division do not.
"""

from __future__ import annotations

import torch

BLOCK = 2**17
"""Elements that are worked on at a time."""


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """``1 / (1 + exp(-x))`` in float32."""
    return x.float().neg().exp_().add_(1).reciprocal_()


def silu(x: torch.Tensor) -> torch.Tensor:
    """``x / (1 + exp(-x))`` in float32."""
    x = x.float()
    return x / x.neg().exp_().add_(1)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``silu(a) * b`` of the two halves (a, b) of ``x [..., 2I]``: ``[..., I]`` (SwiGLU, Shazeer
    2020)."""
    half = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], half)
    # Some rows at a time: five passes over what stays in the processor's cache.
    rows = max(BLOCK // max(half, 1), 1)
    for source, target in zip(
        x.flatten(0, -2).split(rows), out.flatten(0, -2).split(rows), strict=True
    ):
        gate, up = (part.float() for part in source.split(half, dim=-1))
        scaled = gate.neg().exp_().add_(1)
        torch.div(gate, scaled, out=scaled)
        target.copy_(scaled.mul_(up))
    return out


def sigmoid_mul(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """``x * sigmoid(gate)``: the output gate of attention, ``gate`` like x, or of a shared expert,
    ``gate [..., 1]``."""
    return (x.float() * sigmoid(gate)).to(x.dtype)


def silu_mul(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """``x * silu(gate)``, gate like x: what a state space layer without a norm ends with."""
    return silu(gate).mul_(x).to(x.dtype)


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    """``max(x, 0)^2`` (Primer, So et al. 2021)."""
    return x.relu().square_()
