"""Mamba-2 in C++; see ``reference``."""

from __future__ import annotations

from typing import Unpack

import torch

from kernels.mamba2 import reference
from kernels.mamba2.reference import NO_LIMITS, Prompt, Step, gates
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

__all__ = ["chunk_mamba2", "decode_mamba2", "gates"]


def chunk_mamba2(prompt: Prompt, **where: Unpack[ScanInputs]) -> torch.Tensor:
    """Compute ``reference.chunk_mamba2``. Threads share the work by head and sequence."""
    x, B, C, *factors = prompt
    out = scan("chunk_mamba2", (x, B, C), (*factors,), x, B.shape[1], **where)
    return reference.chunk_mamba2(prompt, **where) if out is None else out


def decode_mamba2(
    token: Step, *, limits: tuple[float, float] = NO_LIMITS, **where: Unpack[StepInputs]
) -> torch.Tensor:
    """Compute ``reference.decode_mamba2``. Lengths are those of ``packed.cu_seqlens``."""
    x, B, C, dt, A_log, dt_bias, D = token
    states, slots = where["states"], where["slots"]
    plain = A_log.dtype is dt_bias.dtype is D.dtype is torch.float32
    if not (plain and fits_states((x, B, C, dt), states)):
        return reference.decode_mamba2(token, limits=limits, **where)
    x, B, C = same_stride((x, B, C))
    dt, out = whole_rows(dt), torch.empty(x.shape, dtype=x.dtype)
    name = f"decode_mamba2_{DTYPES[x.dtype]}_{DTYPES[states.dtype]}"
    function(name, "ppppppppippppiiiiiiiifft")(
        x.data_ptr(), B.data_ptr(), C.data_ptr(), dt.data_ptr(), A_log.data_ptr(),
        dt_bias.data_ptr(), D.data_ptr(), states.data_ptr(), states.stride(0), slots.data_ptr(),
        *step_addresses(where), out.data_ptr(), x.stride(0), dt.stride(0),
        len(x), len(slots), B.shape[1], *states.shape[1:], *limits, torch.get_num_threads(),
    )  # fmt: skip
    return out
