"""Kimi Delta Attention for one token at a time in Triton, in one pass over the state.

As `kernels.gdn.decode`, with a decay vector over the rows of the state.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gdn.decode import BLOCK_V, GateInputs, unit
from kernels.gdn.gates import compute_gates
from kernels.strides import row_stride, rows_contiguous


@triton.jit
def decode_kernel(
    p_q,
    p_k,
    p_v,
    inputs,
    p_out,
    p_states,
    p_slots,
    strides,
    stride_slot,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Program (i_v, i_head, i_sequence): updates ``[K, BV]`` of the state in a slot in place."""
    i_v, i_head, i_token = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    stride_q, stride_k, stride_v, stride_a, stride_b = strides
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    mask = m_k[:, None] & m_v
    p_state = p_states + tl.load(p_slots + i_token).to(tl.int64) * stride_slot
    p_state += i_head * K * V + o_k[:, None] * V + o_v
    b_state = tl.load(p_state, mask=mask, other=0.0).to(tl.float32)
    o_key = i_head * K + o_k
    b_q = unit(tl.load(p_q + i_token * stride_q + o_key, mask=m_k, other=0.0)) * scale
    b_k = unit(tl.load(p_k + i_token * stride_k + o_key, mask=m_k, other=0.0))
    b_v = tl.load(p_v + i_token * stride_v + i_head * V + o_v, mask=m_v, other=0.0)
    b_gate, b_beta = compute_gates(
        tl.load(inputs.a + i_token * stride_a + o_key, mask=m_k, other=0.0),
        tl.load(inputs.b + i_token * stride_b + i_head),
        tl.load(inputs.A_log + i_head),
        tl.load(inputs.dt_bias + o_key, mask=m_k, other=0.0),
        inputs.max_beta,
    )
    b_state *= tl.exp(b_gate)[:, None]
    b_delta = (b_v.to(tl.float32) - tl.sum(b_state * b_k[:, None], axis=0)) * b_beta
    b_state += b_k[:, None] * b_delta
    b_out = tl.sum(b_state * b_q[:, None], axis=0)
    p_row = p_out + (i_token * H + i_head) * V + o_v
    tl.store(p_row, b_out.to(p_out.dtype.element_ty), mask=m_v)
    tl.store(p_state, b_state.to(p_states.dtype.element_ty), mask=mask)


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
    scale: float | None = None,
) -> torch.Tensor:
    """Compute one token of B sequences: gates, normalisation, state update and read-out.

    One launch.

    - ``query``, ``key``: ``[B, H, K]``. ``value``: ``[B, H, V]``. ``a``: ``[B, H, K]``, ``b``:
      ``[B, H]``, see `kernels.kda.gates`. Each token is contiguous, with any stride between tokens.
    - ``states``: ``[S, H, K, V]``, changed in place at ``slots`` int32[B]. A state is contiguous,
      with any stride between slots. ``scale``: ``K ** -0.5`` if None.

    Returns ``[B, H, V]`` in value's dtype. Formula and source: `kernels.kda.reference`.
    """
    out = value.new_empty(value.shape)
    tokens = [rows_contiguous(x) for x in (query, key, value, a, b)]
    (num_heads, key_dim), value_dim = key.shape[-2:], value.shape[-1]
    stride_slot = row_stride("a state", states)
    block_v = min(BLOCK_V, triton.next_power_of_2(value_dim))
    if len(slots):
        decode_kernel[triton.cdiv(value_dim, block_v), num_heads, len(slots)](
            *tokens[:3],
            GateInputs(*tokens[3:], A_log, dt_bias, 1.0),
            out,
            states,
            slots,
            tuple(x.stride(0) for x in tokens),
            stride_slot,
            scale or key_dim**-0.5,
            H=num_heads,
            K=key_dim,
            V=value_dim,
            BK=triton.next_power_of_2(key_dim),
            BV=block_v,
            num_warps=2,
        )
    return out
