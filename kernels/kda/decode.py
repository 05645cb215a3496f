"""Kimi Delta Attention token by token in Triton, in one pass over the state.

As `kernels.gdn.decode`, with a decay vector over the rows of the state.
"""

from __future__ import annotations

from typing import Unpack

import torch
import triton
import triton.language as tl

from kernels.gdn.decode import Inputs, write_and_read
from kernels.gdn.gates import compute_gates
from kernels.packed import StepInputs
from kernels.recurrence import decode
from kernels.strides import rows_contiguous


@triton.jit
def step(b_state, i_token, i_head, o_k, o_v, inputs,
         H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr):  # fmt: skip
    """Advance the state ``[BK, BV]`` by one token; see `kernels.recurrence`."""
    stride_q, stride_k, stride_v, stride_a, stride_b = inputs.strides
    m_k, m_v = o_k < K, o_v < V
    o_key = i_head * K + o_k
    b_q = tl.load(inputs.query + i_token * stride_q + o_key, mask=m_k, other=0.0)
    b_k = tl.load(inputs.key + i_token * stride_k + o_key, mask=m_k, other=0.0)
    b_v = tl.load(inputs.value + i_token * stride_v + i_head * V + o_v, mask=m_v, other=0.0)
    b_gate, b_beta = compute_gates(
        tl.load(inputs.a + i_token * stride_a + o_key, mask=m_k, other=0.0),
        tl.load(inputs.b + i_token * stride_b + i_head),
        tl.load(inputs.A_log + i_head),
        tl.load(inputs.dt_bias + o_key, mask=m_k, other=0.0),
        inputs.max_beta,
    )
    b_decay = tl.exp(b_gate)[:, None]
    return write_and_read(b_state, b_q, b_k, b_v, b_decay, b_beta, inputs.scale)


def decode_kda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    *,
    scale: float | None = None,
    **where: Unpack[StepInputs],
) -> torch.Tensor:
    """Compute one token of B sequences, or several with ``packed`` and ``step_slots``.

    One launch. Arguments, formula and source: `kernels.kda.reference`. Each token and each state is
    contiguous, with any stride between tokens and between slots. The number of tokens of each
    sequence is read from ``packed.cu_seqlens``.
    """
    tokens = [rows_contiguous(x) for x in (query, key, value, a, b)]
    strides = tuple(x.stride(0) for x in tokens)
    return decode(
        step,
        Inputs(*tokens, A_log, dt_bias, 1.0, scale or key.shape[-1] ** -0.5, strides),
        value.new_empty(value.shape),
        num_groups=key.shape[-2],
        config={"num_warps": 2},
        **where,
    )
