"""Root-mean-square norms in plain PyTorch (Zhang and Sennrich, 2019). Computed in float32, rounded
once at the end."""

from __future__ import annotations

from typing import overload

import torch

from kernels.activation.reference import silu


@overload
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, residual: None = None
) -> torch.Tensor: ...
@overload
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]: ...
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension of ``x [..., N]``.

    ``weight`` is ``[N]``. With a ``residual`` (like x) the norm is that of their sum, rounded to
    x's dtype; returns ``(norm, sum)``.
    """
    if residual is not None:
        x = x + residual
    normed = _normed(x.float(), weight.float(), eps).to(x.dtype)
    return normed if residual is None else (normed, x)


def gated_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor,
    eps: float,
    *,
    gate_first: bool = False,
) -> torch.Tensor:
    """``rms_norm(x) * silu(gate)``, x and gate ``[..., N]``: what a Gated DeltaNet layer ends with,
    per head. With ``gate_first`` ``rms_norm(x * silu(gate))``, as a Mamba-2 layer, per group.

    ``weight`` is ``[N]``, or ``[H, N]`` for x ``[..., H, N]``.
    """
    if gate_first:
        return _normed(silu(gate).mul_(x), weight.float(), eps).to(x.dtype)
    normed = _normed(x.float(), weight.float(), eps)
    return normed.mul_(silu(gate)).to(x.dtype)


def _normed(x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """As ``F.rms_norm``, in half the operations: on a CPU that is a composite."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (x * norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()).mul_(scale)
