"""Mamba-2 for one token at a time in Triton: gates, update and read-out in one pass over the state.

A program holds ``[K, BV]`` of one state in registers, so a state is read once and written once. At
K = 128, V = 64 in float32 this is 64 KiB per head and token for 0.05 MFLOP, so the kernel is bound
by memory bandwidth.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.mamba2.gates import compute_gates
from kernels.mamba2.reference import NO_LIMITS
from kernels.strides import row_stride, rows_contiguous
from kernels.tuning import tuned

BLOCK_V = 32
"""Columns of a state per program: rows of 128 bytes in float32."""


class GateInputs(NamedTuple):
    """Inputs of a token's gates, and D, passed to kernels as one argument."""

    dt: torch.Tensor
    A_log: torch.Tensor
    dt_bias: torch.Tensor
    D: torch.Tensor
    low: float
    high: float


@triton.jit
def decode_kernel(
    p_x,
    p_b,
    p_c,
    inputs,
    p_out,
    p_states,
    p_slots,
    strides,
    stride_slot,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Program (i_v, i_head, i_sequence): updates ``[K, BV]`` of the state in a slot in place."""
    i_v, i_head, i_token = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    stride_x, stride_b, stride_c, stride_dt = strides
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    mask = m_k[:, None] & m_v
    o_key = i_head // (HV // H) * K + o_k
    b_x = tl.load(p_x + i_token * stride_x + i_head * V + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_b = tl.load(p_b + i_token * stride_b + o_key, mask=m_k, other=0.0).to(tl.float32)
    b_c = tl.load(p_c + i_token * stride_c + o_key, mask=m_k, other=0.0).to(tl.float32)
    b_gate, b_step = compute_gates(
        tl.load(inputs.dt + i_token * stride_dt + i_head),
        tl.load(inputs.A_log + i_head),
        tl.load(inputs.dt_bias + i_head),
        inputs.low,
        inputs.high,
    )
    p_state = p_states + tl.load(p_slots + i_token).to(tl.int64) * stride_slot
    p_state += i_head * K * V + o_k[:, None] * V + o_v
    b_state = tl.load(p_state, mask=mask, other=0.0).to(tl.float32) * tl.exp(b_gate)
    b_state += b_b[:, None] * (b_x * b_step)
    b_out = tl.sum(b_state * b_c[:, None], axis=0)
    b_out += b_x * tl.load(inputs.D + i_head).to(tl.float32)
    p_row = p_out + (i_token * HV + i_head) * V + o_v
    tl.store(p_row, b_out.to(p_out.dtype.element_ty), mask=m_v)
    tl.store(p_state, b_state.to(p_states.dtype.element_ty), mask=mask)


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
    limits: tuple[float, float] = NO_LIMITS,
) -> torch.Tensor:
    """Compute one token of B sequences: gates, update of the state in each slot, read-out.

    One launch.

    - ``x``: ``[B, HV, V]``. ``B``, ``C``: ``[B, H, K]``. ``dt``: ``[B, HV]``, see
      `kernels.mamba2.gates`. Each token is contiguous, with any stride between tokens.
    - ``states``: ``[S, HV, K, V]``, changed in place at ``slots`` int32[B]. A state is contiguous,
      with any stride between slots.

    Returns ``[B, HV, V]`` in x's dtype. Formula and source: `kernels.mamba2.reference`.
    """
    out = x.new_empty(x.shape)
    tokens = [rows_contiguous(part) for part in (x, B, C, dt)]
    (num_groups, key_dim), (num_heads, value_dim) = B.shape[1:], x.shape[1:]
    config = {
        "BV": min(BLOCK_V, triton.next_power_of_2(value_dim)),
        "num_warps": 2 if key_dim <= 128 else 4,
    }
    config |= tuned("mamba2.decode_kernel", states.dtype, key_dim, value_dim)
    if len(slots):
        decode_kernel[triton.cdiv(value_dim, config["BV"]), num_heads, len(slots)](
            *tokens[:3],
            GateInputs(tokens[3], A_log, dt_bias, D, *(float(limit) for limit in limits)),
            out,
            states,
            slots,
            tuple(part.stride(0) for part in tokens),
            row_stride("a state", states),
            H=num_groups,
            HV=num_heads,
            K=key_dim,
            V=value_dim,
            BK=triton.next_power_of_2(key_dim),
            **config,
        )
    return out
