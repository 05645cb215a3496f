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
    """Compute ``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension of ``x [..., N]``.

    ``weight`` is ``[N]``. With a ``residual`` (like x), the sum of both is normalised, rounded to
    x's dtype, and the result is ``(norm, sum)``.
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
    """Compute ``rms_norm(x) * silu(gate)`` for x and gate ``[..., N]``, as in Gated DeltaNet.

    With ``gate_first`` it is ``rms_norm(x * silu(gate))``, as in Mamba-2. ``weight`` is ``[N]``, or
    ``[H, N]`` for x ``[..., H, N]``.
    """
    if gate_first:
        return _normed(silu(gate).mul_(x), weight.float(), eps).to(x.dtype)
    normed = _normed(x.float(), weight.float(), eps)
    return normed.mul_(silu(gate)).to(x.dtype)


def _normed(x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute ``F.rms_norm`` with half of the operations of its composite form on a CPU."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (x * norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()).mul_(scale)
