"""Gated DeltaNet in C++; see ``reference``."""

from __future__ import annotations

from typing import Unpack

import torch

from kernels.gdn import reference
from kernels.gdn.reference import gates
from kernels.native import DTYPES, fits_states, function, same_stride, scan, step_addresses
from kernels.packed import ScanInputs, StepInputs

__all__ = ["chunk_gdn", "decode_gdn", "gates"]


def chunk_gdn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    **where: Unpack[ScanInputs],
) -> torch.Tensor:
    """Compute ``reference.chunk_gdn``. Threads share the work by head and sequence."""
    tokens, factors = (query, key, value), (gate, beta)
    scale = scale or key.shape[-1] ** -0.5
    out = scan("chunk_gdn", tokens, factors, value, key.shape[1], scale, **where)
    return reference.chunk_gdn(*tokens, *factors, scale=scale, **where) if out is None else out


def decode_gdn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    *,
    scale: float | None = None,
    max_beta: float = 1.0,
    **where: Unpack[StepInputs],
) -> torch.Tensor:
    """Compute ``reference.decode_gdn``. Lengths are those of ``packed.cu_seqlens``."""
    tokens, states, slots = (query, key, value, a, b), where["states"], where["slots"]
    if not (A_log.dtype is dt_bias.dtype is torch.float32 and fits_states(tokens, states)):
        return reference.decode_gdn(
            *tokens, A_log, dt_bias, scale=scale, max_beta=max_beta, **where
        )
    query, key, value = same_stride(tokens[:3])
    a, b = same_stride(tokens[3:])
    num_rows, num_heads, key_dim = query.shape
    num_value_heads, value_dim = value.shape[1:]
    out = torch.empty(value.shape, dtype=value.dtype)
    name = f"decode_gdn_{DTYPES[query.dtype]}_{DTYPES[states.dtype]}"
    function(name, "ppppppppippppiiiiiiiifft")(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), a.data_ptr(), b.data_ptr(),
        A_log.data_ptr(), dt_bias.data_ptr(), states.data_ptr(), states.stride(0),
        slots.data_ptr(), *step_addresses(where), out.data_ptr(),
        value.stride(0), a.stride(0), num_rows, len(slots), num_heads, num_value_heads, key_dim,
        value_dim, key_dim**-0.5 if scale is None else scale, max_beta, torch.get_num_threads(),
    )  # fmt: skip
    return out
