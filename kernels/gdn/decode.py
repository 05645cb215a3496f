"""Gated DeltaNet for one token at a time in Triton, in one pass over the state.

Gates, normalisation, update and read-out are one kernel. A program holds ``[K, BV]`` of one state
in registers, so a state is read once and written once. At K = V = 128 in float32 this is 128 KiB
per head and token for 0.1 MFLOP, so the kernel is bound by memory bandwidth. V is divided so that a
single sequence occupies every multiprocessor. Verification repeats the same step and stores the
state after each token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.gdn.gates import compute_gates
from kernels.packed import Packed
from kernels.strides import row_stride, rows_contiguous
from kernels.tuning import tuned

BLOCK_V = 32
"""Columns of a state per program: rows of 128 bytes in float32."""


class GateInputs(NamedTuple):
    """Inputs of a token's gates, passed to kernels as one argument."""

    a: torch.Tensor
    b: torch.Tensor
    A_log: torch.Tensor
    dt_bias: torch.Tensor
    max_beta: float


@triton.jit
def step(b_state, i_token, i_head, o_k, o_v, p_q, p_k, p_v, inputs, p_out, strides, scale,
         H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr):  # fmt: skip
    """Advance the state ``[BK, BV]`` by token ``i_token``, and store the token's read-out."""
    stride_q, stride_k, stride_v, stride_a, stride_b = strides
    m_k, m_v = o_k < K, o_v < V
    o_key = i_head // (HV // H) * K + o_k
    b_q = unit(tl.load(p_q + i_token * stride_q + o_key, mask=m_k, other=0.0)) * scale
    b_k = unit(tl.load(p_k + i_token * stride_k + o_key, mask=m_k, other=0.0))
    b_v = tl.load(p_v + i_token * stride_v + i_head * V + o_v, mask=m_v, other=0.0)
    b_gate, b_beta = compute_gates(
        tl.load(inputs.a + i_token * stride_a + i_head),
        tl.load(inputs.b + i_token * stride_b + i_head),
        tl.load(inputs.A_log + i_head),
        tl.load(inputs.dt_bias + i_head),
        inputs.max_beta,
    )
    b_state *= tl.exp(b_gate)
    b_delta = (b_v.to(tl.float32) - tl.sum(b_state * b_k[:, None], axis=0)) * b_beta
    b_state += b_k[:, None] * b_delta
    b_out = tl.sum(b_state * b_q[:, None], axis=0)
    p_row = p_out + (i_token * HV + i_head) * V + o_v
    tl.store(p_row, b_out.to(p_out.dtype.element_ty), mask=m_v)
    return b_state


@triton.jit
def unit(b_x):
    """Compute ``x / sqrt(sum(x^2) + 1e-6)`` of one vector, in float32."""
    b_x = b_x.to(tl.float32)
    return b_x * tl.rsqrt(tl.sum(b_x * b_x, axis=0) + 1e-6)


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
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Program (i_v, i_head, i_sequence): updates ``[K, BV]`` of the state in a slot in place."""
    i_v, i_head, i_token = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    mask = (o_k < K)[:, None] & (o_v < V)
    p_state = p_states + tl.load(p_slots + i_token).to(tl.int64) * stride_slot
    p_state += i_head * K * V + o_k[:, None] * V + o_v
    b_state = tl.load(p_state, mask=mask, other=0.0).to(tl.float32)
    b_state = step(
        b_state, i_token, i_head, o_k, o_v, p_q, p_k, p_v, inputs, p_out, strides, scale,
        H, HV, K, V,
    )  # fmt: skip
    tl.store(p_state, b_state.to(p_states.dtype.element_ty), mask=mask)


@triton.jit
def verify_kernel(
    p_q,
    p_k,
    p_v,
    inputs,
    p_out,
    p_states,
    p_slots,
    p_step_slots,
    p_cu_seqlens,
    strides,
    stride_slot,
    scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Program (i_v, i_head, i_sequence): carries ``[K, BV]`` of a state through a sequence's
    tokens, and stores the state after each token in a separate slot."""
    i_v, i_head, i_sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    mask = (o_k < K)[:, None] & (o_v < V)
    o_state = i_head * K * V + o_k[:, None] * V + o_v
    i_slot = tl.load(p_slots + i_sequence).to(tl.int64)
    first = tl.load(p_cu_seqlens + i_sequence).to(tl.int64)
    end = tl.load(p_cu_seqlens + i_sequence + 1).to(tl.int64)
    # A captured graph can have many empty sequences.
    m_state = mask & (first < end)
    b_state = tl.load(p_states + i_slot * stride_slot + o_state, mask=m_state, other=0.0).to(
        tl.float32
    )
    for i_token in range(first, end):
        b_state = step(
            b_state, i_token, i_head, o_k, o_v, p_q, p_k, p_v, inputs, p_out, strides, scale,
            H, HV, K, V,
        )  # fmt: skip
        b_kept = b_state.to(p_states.dtype.element_ty)
        p_kept = p_states + tl.load(p_step_slots + i_token).to(tl.int64) * stride_slot
        tl.store(p_kept + o_state, b_kept, mask=mask)
        b_state = b_kept.to(tl.float32)


def decode_gdn(
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
    max_beta: float = 1.0,
) -> torch.Tensor:
    """Compute one token of B sequences: gates, normalisation, state update and read-out.

    One launch.

    - ``query``, ``key``: ``[B, H, K]``. ``value``: ``[B, HV, V]``. ``a``, ``b``: ``[B, HV]``, see
      `kernels.gdn.gates`. Each token is contiguous, with any stride between tokens.
    - ``states``: ``[S, HV, K, V]``, changed in place at ``slots`` int32[B]. A state is contiguous,
      with any stride between slots. ``scale``: ``K ** -0.5`` if None. ``max_beta``: as in `gates`.

    Returns ``[B, HV, V]`` in value's dtype. Formula and source: `kernels.gdn.reference`.
    """
    out = value.new_empty(value.shape)
    tokens = [rows_contiguous(x) for x in (query, key, value, a, b)]
    grid, sizes = _launch(key, value, states.dtype, num_sequences=len(slots))
    if len(slots):
        decode_kernel[grid](
            *tokens[:3],
            GateInputs(*tokens[3:], A_log, dt_bias, max_beta),
            out,
            states,
            slots,
            tuple(x.stride(0) for x in tokens),
            row_stride("a state", states),
            scale or key.shape[-1] ** -0.5,
            **sizes,
        )
    return out


def verify_gdn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    *,
    states: torch.Tensor,
    packed: Packed,
    slots: torch.Tensor,
    step_slots: torch.Tensor,
    scale: float | None = None,
    max_beta: float = 1.0,
) -> torch.Tensor:
    """Compute several tokens of B sequences and keep the state after each, for verification.

    One launch. Bits are equal to those of `decode_gdn`, called once per step. Tokens are packed,
    ``[T, ...]``, and the states in ``slots`` int32[B] are only read. The state after token t is
    written to slot ``step_slots[t]`` of the same ``states``, int32[T]. No other access to these
    slots is allowed, except that a sequence of one token may use its own slot.
    """
    out = value.new_empty(value.shape)
    tokens = [rows_contiguous(x) for x in (query, key, value, a, b)]
    grid, sizes = _launch(key, value, states.dtype, num_sequences=len(slots))
    if out.numel():
        verify_kernel[grid](
            *tokens[:3],
            GateInputs(*tokens[3:], A_log, dt_bias, max_beta),
            out,
            states,
            slots,
            step_slots,
            packed.cu_seqlens,
            tuple(x.stride(0) for x in tokens),
            row_stride("a state", states),
            scale or key.shape[-1] ** -0.5,
            **sizes,
        )
    return out


def _launch(
    key: torch.Tensor, value: torch.Tensor, state_dtype: torch.dtype, *, num_sequences: int
) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Return one launch configuration for decoding and verification, so that their bits agree."""
    (num_heads, key_dim), (num_value_heads, value_dim) = key.shape[-2:], value.shape[-2:]
    sizes = {
        "H": num_heads,
        "HV": num_value_heads,
        "K": key_dim,
        "V": value_dim,
        "BK": triton.next_power_of_2(key_dim),
        "BV": min(BLOCK_V, triton.next_power_of_2(value_dim)),
        "num_warps": 2,
    }
    sizes |= tuned("gdn.decode_kernel", state_dtype, key_dim, value_dim)
    return (triton.cdiv(value_dim, sizes["BV"]), num_value_heads, num_sequences), sizes
