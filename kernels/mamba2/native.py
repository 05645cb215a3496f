"""Mamba-2 with ``native.cpp`` and ``native_chunk.cpp``; see ``reference``."""

from __future__ import annotations

import torch

from kernels.mamba2 import reference
from kernels.mamba2.reference import NO_LIMITS, gates
from kernels.native import (
    DTYPES,
    LANES,
    function,
    has,
    has_whole_rows,
    same_stride,
    step_addresses,
    whole_rows,
)
from kernels.packed import Exports, Packed

__all__ = ["chunk_mamba2", "decode_mamba2", "gates"]

MAX_KEY = 512


def chunk_mamba2(
    x: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    gate: torch.Tensor,
    step: torch.Tensor,
    D: torch.Tensor,
    *,
    states: torch.Tensor,
    packed: Packed,
    slots: torch.Tensor,
    resumed: torch.Tensor,
    exports: Exports | None,
) -> torch.Tensor:
    """Compute ``reference.chunk_mamba2``. Threads share the work by head and sequence."""
    name = f"chunk_mamba2_{DTYPES.get(x.dtype)}_{DTYPES.get(states.dtype)}"
    if not _fits((x, B, C), states) or not has(name):
        return reference.chunk_mamba2(
            x,
            B,
            C,
            gate,
            step,
            D,
            states=states,
            packed=packed,
            slots=slots,
            resumed=resumed,
            exports=exports,
        )
    x, B, C = same_stride((x, B, C))
    gate, step, D = (part.float().contiguous() for part in (gate, step, D))
    ends, export_slots, cu_exports = packed.no_exports if exports is None else exports.tables
    out = torch.empty(x.shape, dtype=x.dtype)
    function(name, "pppppppipppppppiiiiiiit")(
        x.data_ptr(), B.data_ptr(), C.data_ptr(), gate.data_ptr(), step.data_ptr(), D.data_ptr(),
        states.data_ptr(), states.stride(0), slots.data_ptr(), resumed.data_ptr(),
        packed.cu_seqlens.data_ptr(), ends.data_ptr(), export_slots.data_ptr(),
        cu_exports.data_ptr(), out.data_ptr(), x.stride(0), packed.tile_size, len(slots),
        B.shape[1], *states.shape[1:], torch.get_num_threads(),
    )  # fmt: skip
    return out


def decode_mamba2(
    x: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    dt: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    D: torch.Tensor,
    *,
    states: torch.Tensor,
    slots: torch.Tensor,
    packed: Packed | None = None,
    step_slots: torch.Tensor | None = None,
    limits: tuple[float, float] = NO_LIMITS,
) -> torch.Tensor:
    """Compute ``reference.decode_mamba2``. Lengths are those of ``packed.cu_seqlens``."""
    parameters = A_log, dt_bias, D
    if not (
        _fits((x, B, C, dt), states) and all(part.dtype is torch.float32 for part in parameters)
    ):
        return reference.decode_mamba2(
            x,
            B,
            C,
            dt,
            *parameters,
            states=states,
            slots=slots,
            packed=packed,
            step_slots=step_slots,
            limits=limits,
        )
    x, B, C = same_stride((x, B, C))
    dt, out = whole_rows(dt), torch.empty(x.shape, dtype=x.dtype)
    name = f"decode_mamba2_{DTYPES[x.dtype]}_{DTYPES[states.dtype]}"
    function(name, "ppppppppippppiiiiiiiifft")(
        x.data_ptr(), B.data_ptr(), C.data_ptr(), dt.data_ptr(), A_log.data_ptr(),
        dt_bias.data_ptr(), D.data_ptr(), states.data_ptr(), states.stride(0), slots.data_ptr(),
        *step_addresses(slots, packed, step_slots), out.data_ptr(), x.stride(0), dt.stride(0),
        len(x), len(slots), B.shape[1], *states.shape[1:], *limits, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _fits(tokens: tuple[torch.Tensor, ...], states: torch.Tensor) -> bool:
    key_dim, value_dim = states.shape[2:]
    return (
        tokens[0].dtype in DTYPES
        and states.dtype in DTYPES
        and all(x.dtype is tokens[0].dtype for x in tokens)
        and key_dim % LANES == 0
        and value_dim % LANES == 0
        and key_dim <= MAX_KEY
        and has_whole_rows(states)
    )
