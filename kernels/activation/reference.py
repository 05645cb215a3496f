"""Gated activations in plain PyTorch.

Uses exp instead of ``torch.sigmoid`` and ``F.silu``. On AVX-512 those give the elements after the
last full vector different bits, so a row's result would depend on its position. exp and division do
not.
"""

from __future__ import annotations

import torch

BLOCK = 2**17
"""Number of elements computed at once."""


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """Compute ``1 / (1 + exp(-x))`` in float32."""
    return x.float().neg().exp_().add_(1).reciprocal_()


def silu(x: torch.Tensor) -> torch.Tensor:
    """Compute ``x / (1 + exp(-x))`` in float32."""
    x = x.float()
    return x / x.neg().exp_().add_(1)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """Compute ``silu(a) * b`` of the halves (a, b) of ``x [..., 2I]`` (SwiGLU, Shazeer 2020).

    Returns ``[..., I]``.
    """
    half = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], half)
    # A few rows at a time, so that the five passes hit the processor's cache.
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
    """Compute ``x * sigmoid(gate)``.

    ``gate`` has the shape of x (output gate of attention) or ``[..., 1]`` (shared expert).
    """
    return (x.float() * sigmoid(gate)).to(x.dtype)


def silu_mul(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Compute ``x * silu(gate)`` of equal shapes: the end of a state space layer without a norm."""
    return silu(gate).mul_(x).to(x.dtype)


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    """Compute ``max(x, 0)^2`` (Primer, So et al. 2021)."""
    return x.relu().square_()
