"""Kimi Delta Attention in C++; see ``reference``."""

from __future__ import annotations

from typing import Unpack

import torch

from kernels.kda import reference
from kernels.kda.reference import gates
from kernels.native import (
    DTYPES,
    fits_states,
    function,
    same_stride,
    scan,
    step_addresses,
    whole_rows,
)
from kernels.packed import ScanInputs, StepInputs

__all__ = ["chunk_kda", "decode_kda", "gates"]


def chunk_kda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    **where: Unpack[ScanInputs],
) -> torch.Tensor:
    """Compute ``reference.chunk_kda``. Threads share the work by head and sequence."""
    tokens, factors = (query, key, value), (gate, beta)
    scale = scale or key.shape[-1] ** -0.5
    out = scan("chunk_kda", tokens, factors, value, key.shape[1], scale, **where)
    return reference.chunk_kda(*tokens, *factors, scale=scale, **where) if out is None else out


def decode_kda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    *,
    scale: float | None = None,
    **where: Unpack[StepInputs],
) -> torch.Tensor:
    """Compute ``reference.decode_kda``. Lengths are those of ``packed.cu_seqlens``."""
    tokens, states, slots = (query, key, value, a, b), where["states"], where["slots"]
    if not (A_log.dtype is dt_bias.dtype is torch.float32 and fits_states(tokens, states)):
        return reference.decode_kda(*tokens, A_log, dt_bias, scale=scale, **where)
    query, key, value = same_stride(tokens[:3])
    a, b, dt_bias = whole_rows(a), whole_rows(b), dt_bias.contiguous()
    out = torch.empty(value.shape, dtype=value.dtype)
    function(f"decode_kda_{DTYPES[query.dtype]}_{DTYPES[states.dtype]}", "ppppppppippppiiiiiiiift")(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), a.data_ptr(), b.data_ptr(),
        A_log.data_ptr(), dt_bias.data_ptr(), states.data_ptr(), states.stride(0),
        slots.data_ptr(), *step_addresses(where), out.data_ptr(),
        value.stride(0), a.stride(0), b.stride(0), len(value), len(slots), *states.shape[1:],
        states.shape[2] ** -0.5 if scale is None else scale, torch.get_num_threads(),
    )  # fmt: skip
    return out
