"""Gated activations with ``native.cpp``; see ``reference``."""

from __future__ import annotations

import torch

from kernels.activation import reference
from kernels.activation.reference import relu_squared, sigmoid, silu, silu_mul
from kernels.native import DTYPES, function

__all__ = ["relu_squared", "sigmoid", "sigmoid_mul", "silu", "silu_and_mul", "silu_mul"]


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """Compute ``reference.silu_and_mul``."""
    if x.dtype not in DTYPES or x.dim() != 2:
        return reference.silu_and_mul(x)
    if x.stride(1) != 1:
        x = x.contiguous()
    num_rows, half = x.shape[0], x.shape[1] // 2
    out = x.new_empty(num_rows, half)
    function(f"silu_and_mul_{DTYPES[x.dtype]}", "pipiit")(
        x.data_ptr(), x.stride(0), out.data_ptr(), num_rows, half, torch.get_num_threads()
    )
    return out


def sigmoid_mul(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Compute ``reference.sigmoid_mul``."""
    if x.dtype not in DTYPES or x.dim() != 2 or gate.dim() != 2 or gate.dtype is not x.dtype:
        return reference.sigmoid_mul(x, gate)
    x, gate = (part if part.stride(1) == 1 else part.contiguous() for part in (x, gate))
    out = x.new_empty(x.shape)
    function(f"sigmoid_mul_{DTYPES[x.dtype]}", "pipiipiit")(
        x.data_ptr(), x.stride(0), gate.data_ptr(), gate.stride(0), gate.shape[1],
        out.data_ptr(), *x.shape, torch.get_num_threads(),
    )  # fmt: skip
    return out
