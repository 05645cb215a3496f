"""Root-mean-square norms with ``native.cpp``; see ``reference``."""

from __future__ import annotations

from typing import overload

import torch

from kernels.native import DTYPES, address, function, has_whole_rows
from kernels.norm import reference

__all__ = ["gated_rms_norm", "rms_norm"]


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
    """Compute ``reference.rms_norm``."""
    word = DTYPES.get(x.dtype)
    if word is None or weight.dtype is not torch.float32:
        return reference.rms_norm(x, weight, eps, residual=residual)
    size = x.shape[-1]
    x, outer, inner = _rows(x)
    normed = x.new_empty(x.shape)
    total = None
    if residual is not None:
        residual, _, _ = _rows(residual)
        total = x.new_empty(x.shape)
    function(f"rms_norm_{word}", "pipipppiiift")(
        x.data_ptr(), x.stride(0), address(residual), 0 if residual is None else residual.stride(0),
        weight.data_ptr(), normed.data_ptr(), address(total), outer, inner, size, eps,
        torch.get_num_threads(),
    )  # fmt: skip
    return normed if total is None else (normed, total)


def gated_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor,
    eps: float,
    *,
    gate_first: bool = False,
) -> torch.Tensor:
    """Compute ``reference.gated_rms_norm``."""
    word = DTYPES.get(x.dtype)
    by_head = weight.dim() == 2 and x.dim() == 3 and len(weight) == x.shape[1]
    if (
        word is None
        or not (weight.dim() == 1 or by_head)
        or weight.dtype is not torch.float32
        or gate.dtype is not x.dtype
    ):
        return reference.gated_rms_norm(x, weight, gate, eps, gate_first=gate_first)
    x, outer, inner = _rows(x)
    gate, _, _ = _rows(gate)
    weight, out = weight.contiguous(), x.new_empty(x.shape)
    function(f"gated_rms_norm_{word}", "pipipipiiifit")(
        x.data_ptr(), x.stride(0), gate.data_ptr(), gate.stride(0), weight.data_ptr(),
        weight.stride(0) if by_head else 0, out.data_ptr(), outer, inner, x.shape[-1], eps,
        gate_first, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """Return x ``[T, ..., N]`` with dense tokens, the stride of T, and the rows per token."""
    if not has_whole_rows(x) or x.dim() < 2:
        x = x.contiguous()
    outer = x.shape[0] if x.dim() > 1 else 1
    return x, outer, x.numel() // max(outer * x.shape[-1], 1)
