"""Mamba-2 token by token in Triton: gates, update and read-out in one pass over the state
(`kernels.recurrence`)."""

from __future__ import annotations

from typing import NamedTuple, Unpack

import torch
import triton
import triton.language as tl

from kernels.mamba2.gates import compute_gates
from kernels.mamba2.reference import NO_LIMITS
from kernels.packed import StepInputs
from kernels.recurrence import decode, decode_kernel
from kernels.strides import rows_contiguous
from kernels.tuning import tuned

__all__ = ["decode_kernel", "decode_mamba2"]


class Inputs(NamedTuple):
    """Tokens, parameters, and strides between tokens, passed to kernels as one argument."""

    x: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    dt: torch.Tensor
    A_log: torch.Tensor
    dt_bias: torch.Tensor
    D: torch.Tensor
    low: float
    high: float
    strides: tuple[int, ...]


@triton.jit
def step(b_state, i_token, i_head, o_k, o_v, inputs,
         H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr):  # fmt: skip
    """Advance the state ``[BK, BV]`` by one token; see `kernels.recurrence`."""
    stride_x, stride_b, stride_c, stride_dt = inputs.strides
    m_k, m_v = o_k < K, o_v < V
    o_key = i_head // (HV // H) * K + o_k
    b_x = tl.load(inputs.x + i_token * stride_x + i_head * V + o_v, mask=m_v, other=0.0)
    b_b = tl.load(inputs.B + i_token * stride_b + o_key, mask=m_k, other=0.0).to(tl.float32)
    b_c = tl.load(inputs.C + i_token * stride_c + o_key, mask=m_k, other=0.0).to(tl.float32)
    b_x = b_x.to(tl.float32)
    b_gate, b_step = compute_gates(
        tl.load(inputs.dt + i_token * stride_dt + i_head),
        tl.load(inputs.A_log + i_head),
        tl.load(inputs.dt_bias + i_head),
        inputs.low,
        inputs.high,
    )
    b_state *= tl.exp(b_gate)
    b_state += b_b[:, None] * (b_x * b_step)
    b_out = tl.sum(b_state * b_c[:, None], axis=0)
    b_out += b_x * tl.load(inputs.D + i_head).to(tl.float32)
    return b_state, b_out


def decode_mamba2(
    x: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    dt: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    D: torch.Tensor,
    *,
    limits: tuple[float, float] = NO_LIMITS,
    **where: Unpack[StepInputs],
) -> torch.Tensor:
    """Compute one token of B sequences, or several with ``packed`` and ``step_slots``.

    One launch. Arguments, formula and source: `kernels.mamba2.reference`. Each token and each state
    is contiguous, with any stride between tokens and between slots. The number of tokens of each
    sequence is read from ``packed.cu_seqlens``.
    """
    tokens = [rows_contiguous(part) for part in (x, B, C, dt)]
    strides = tuple(part.stride(0) for part in tokens)
    key_dim, value_dim = B.shape[-1], x.shape[-1]
    return decode(
        step,
        Inputs(*tokens, A_log, dt_bias, D, *(float(limit) for limit in limits), strides),
        x.new_empty(x.shape),
        num_groups=B.shape[-2],
        config={"num_warps": 2 if key_dim <= 128 else 4}
        | tuned("mamba2.decode_kernel", where["states"].dtype, key_dim, value_dim),
        **where,
    )
