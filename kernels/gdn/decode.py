"""Gated DeltaNet token by token in Triton: gates, normalisation, update and read-out in one pass
over the state (`kernels.recurrence`)."""

from __future__ import annotations

from typing import NamedTuple, Unpack

import torch
import triton
import triton.language as tl

from kernels.gdn.gates import compute_gates
from kernels.packed import StepInputs
from kernels.recurrence import decode, decode_kernel
from kernels.strides import rows_contiguous
from kernels.tuning import tuned

__all__ = ["decode_gdn", "decode_kernel"]


class Inputs(NamedTuple):
    """Tokens, parameters of their gates, and strides between tokens, passed to kernels as one
    argument."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    A_log: torch.Tensor
    dt_bias: torch.Tensor
    max_beta: float
    scale: float
    strides: tuple[int, ...]


@triton.jit
def step(b_state, i_token, i_head, o_k, o_v, inputs,
         H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr):  # fmt: skip
    """Advance the state ``[BK, BV]`` by one token; see `kernels.recurrence`."""
    stride_q, stride_k, stride_v, stride_a, stride_b = inputs.strides
    m_k, m_v = o_k < K, o_v < V
    o_key = i_head // (HV // H) * K + o_k
    b_q = tl.load(inputs.query + i_token * stride_q + o_key, mask=m_k, other=0.0)
    b_k = tl.load(inputs.key + i_token * stride_k + o_key, mask=m_k, other=0.0)
    b_v = tl.load(inputs.value + i_token * stride_v + i_head * V + o_v, mask=m_v, other=0.0)
    b_gate, b_beta = compute_gates(
        tl.load(inputs.a + i_token * stride_a + i_head),
        tl.load(inputs.b + i_token * stride_b + i_head),
        tl.load(inputs.A_log + i_head),
        tl.load(inputs.dt_bias + i_head),
        inputs.max_beta,
    )
    return write_and_read(b_state, b_q, b_k, b_v, tl.exp(b_gate), b_beta, inputs.scale)


@triton.jit
def write_and_read(b_state, b_q, b_k, b_v, b_decay, b_beta, scale):
    """Compute the delta rule for one token. ``b_decay`` is that of the state, or of each row."""
    b_q, b_k = unit(b_q) * scale, unit(b_k)
    b_state *= b_decay
    b_delta = (b_v.to(tl.float32) - tl.sum(b_state * b_k[:, None], axis=0)) * b_beta
    b_state += b_k[:, None] * b_delta
    return b_state, tl.sum(b_state * b_q[:, None], axis=0)


@triton.jit
def unit(b_x):
    """Compute ``x / sqrt(sum(x^2) + 1e-6)`` of one vector, in float32."""
    b_x = b_x.to(tl.float32)
    return b_x * tl.rsqrt(tl.sum(b_x * b_x, axis=0) + 1e-6)


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
    """Compute one token of B sequences, or several with ``packed`` and ``step_slots``.

    One launch. Arguments, formula and source: `kernels.gdn.reference`. Each token and each state is
    contiguous, with any stride between tokens and between slots. The number of tokens of each
    sequence is read from ``packed.cu_seqlens``.
    """
    tokens = [rows_contiguous(x) for x in (query, key, value, a, b)]
    strides = tuple(x.stride(0) for x in tokens)
    scale = scale or key.shape[-1] ** -0.5
    return decode(
        step,
        Inputs(*tokens, A_log, dt_bias, max_beta, scale, strides),
        value.new_empty(value.shape),
        num_groups=key.shape[-2],
        config={"num_warps": 2}
        | tuned("gdn.decode_kernel", where["states"].dtype, key.shape[-1], value.shape[-1]),
        **where,
    )
