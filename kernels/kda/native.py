"""Kimi Delta Attention with native decoding (``native.cpp``); see ``reference``."""

from __future__ import annotations

import torch

from kernels.kda import reference
from kernels.kda.reference import chunk_kda, gates
from kernels.native import (
    DTYPES,
    LANES,
    function,
    has_whole_rows,
    same_stride,
    step_addresses,
    whole_rows,
)
from kernels.packed import Packed

__all__ = ["chunk_kda", "decode_kda", "gates"]

MAX_KEY = 512


def decode_kda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    *,
    states: torch.Tensor,
    slots: torch.Tensor,
    packed: Packed | None = None,
    step_slots: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Compute ``reference.decode_kda``. Lengths are those of ``packed.cu_seqlens``."""
    tokens, key_dim, value_dim = (query, key, value, a, b), *states.shape[2:]
    if not (
        query.dtype in DTYPES
        and states.dtype in DTYPES
        and all(x.dtype is query.dtype for x in tokens)
        and A_log.dtype is dt_bias.dtype is torch.float32
        and key_dim % LANES == 0
        and value_dim % LANES == 0
        and key_dim <= MAX_KEY
        and has_whole_rows(states)
    ):
        return reference.decode_kda(
            *tokens,
            A_log,
            dt_bias,
            states=states,
            slots=slots,
            packed=packed,
            step_slots=step_slots,
            scale=scale,
        )
    query, key, value = same_stride(tokens[:3])
    a, b, dt_bias = whole_rows(a), whole_rows(b), dt_bias.contiguous()
    out = torch.empty(value.shape, dtype=value.dtype)
    function(f"decode_kda_{DTYPES[query.dtype]}_{DTYPES[states.dtype]}", "ppppppppippppiiiiiiiift")(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), a.data_ptr(), b.data_ptr(),
        A_log.data_ptr(), dt_bias.data_ptr(), states.data_ptr(), states.stride(0),
        slots.data_ptr(), *step_addresses(slots, packed, step_slots), out.data_ptr(),
        value.stride(0), a.stride(0), b.stride(0), len(value), len(slots), value.shape[1], key_dim,
        value_dim, key_dim**-0.5 if scale is None else scale, torch.get_num_threads(),
    )  # fmt: skip
    return out
