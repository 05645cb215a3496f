"""Gated DeltaNet in C++; see ``reference``."""

from __future__ import annotations

from typing import Unpack

import torch

from kernels.gdn import reference
from kernels.gdn.reference import Prompt, Step, gates, scale_of
from kernels.native import DTYPES, fits_states, function, same_stride, scan, step_addresses
from kernels.packed import ScanInputs, StepInputs

__all__ = ["chunk_gdn", "decode_gdn", "gates"]


def chunk_gdn(prompt: Prompt, **where: Unpack[ScanInputs]) -> torch.Tensor:
    """Compute ``reference.chunk_gdn``. Threads share the work by head and sequence."""
    *tokens, gate, beta = prompt
    num_groups, scale = prompt.key.shape[1], scale_of(prompt.key)
    out = scan("chunk_gdn", (*tokens,), (gate, beta), prompt.value, num_groups, scale, **where)
    return reference.chunk_gdn(prompt, **where) if out is None else out


def decode_gdn(token: Step, *, max_beta: float = 1.0, **where: Unpack[StepInputs]) -> torch.Tensor:
    """Compute ``reference.decode_gdn``. Lengths are those of ``packed.cu_seqlens``."""
    *tokens, A_log, dt_bias = token
    states, slots = where["states"], where["slots"]
    if not (A_log.dtype is dt_bias.dtype is torch.float32 and fits_states(tokens, states)):
        return reference.decode_gdn(token, max_beta=max_beta, **where)
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
        value_dim, scale_of(token.key), max_beta, torch.get_num_threads(),
    )  # fmt: skip
    return out
