"""Kimi Delta Attention in C++; see ``reference``."""

from __future__ import annotations

from typing import Unpack

import torch

from kernels.gdn.reference import Prompt, Step, scale_of
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


def chunk_kda(prompt: Prompt, **where: Unpack[ScanInputs]) -> torch.Tensor:
    """Compute ``reference.chunk_kda``. Threads share the work by head and sequence."""
    *tokens, gate, beta = prompt
    num_groups, scale = prompt.key.shape[1], scale_of(prompt.key)
    out = scan("chunk_kda", (*tokens,), (gate, beta), prompt.value, num_groups, scale, **where)
    return reference.chunk_kda(prompt, **where) if out is None else out


def decode_kda(token: Step, **where: Unpack[StepInputs]) -> torch.Tensor:
    """Compute ``reference.decode_kda``. Lengths are those of ``packed.cu_seqlens``."""
    *tokens, A_log, dt_bias = token
    states, slots = where["states"], where["slots"]
    if not (A_log.dtype is dt_bias.dtype is torch.float32 and fits_states(tokens, states)):
        return reference.decode_kda(token, **where)
    query, key, value = same_stride(tokens[:3])
    a, b, dt_bias = whole_rows(tokens[3]), whole_rows(tokens[4]), dt_bias.contiguous()
    out = torch.empty(value.shape, dtype=value.dtype)
    function(f"decode_kda_{DTYPES[query.dtype]}_{DTYPES[states.dtype]}", "ppppppppippppiiiiiiiift")(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), a.data_ptr(), b.data_ptr(),
        A_log.data_ptr(), dt_bias.data_ptr(), states.data_ptr(), states.stride(0),
        slots.data_ptr(), *step_addresses(where), out.data_ptr(),
        value.stride(0), a.stride(0), b.stride(0), len(value), len(slots), *states.shape[1:],
        scale_of(token.key), torch.get_num_threads(),
    )  # fmt: skip
    return out
