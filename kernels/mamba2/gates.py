"""Decay and time step of Mamba-2 in Triton, for prompts. The decode kernel computes its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gdn.gates import softplus
from kernels.mamba2.reference import NO_LIMITS

BLOCK = 1024


@triton.jit
def compute_gates(b_dt, b_A_log, b_dt_bias, low, high):
    """Compute log-decay and time step of one block, in float32, as in `gates`."""
    b_step = softplus(b_dt.to(tl.float32) + b_dt_bias.to(tl.float32))
    b_step = tl.minimum(tl.maximum(b_step, low), high)
    return -tl.exp(b_A_log.to(tl.float32)) * b_step, b_step


@triton.jit(do_not_specialize=["num_tokens"])
def gates_kernel(
    p_dt,
    p_A_log,
    p_dt_bias,
    p_gate,
    p_step,
    num_tokens,
    stride_dt,
    low,
    high,
    HV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i: computes BLOCK of the ``T * HV`` gates, in token order."""
    o_gate = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_gate < num_tokens * HV
    o_token, o_head = o_gate // HV, o_gate % HV
    b_gate, b_step = compute_gates(
        tl.load(p_dt + o_token * stride_dt + o_head, mask=mask),
        tl.load(p_A_log + o_head, mask=mask),
        tl.load(p_dt_bias + o_head, mask=mask),
        low,
        high,
    )
    tl.store(p_gate + o_gate, b_gate, mask=mask)
    tl.store(p_step + o_gate, b_step, mask=mask)


def gates(
    dt: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    limits: tuple[float, float] = NO_LIMITS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log-decay ``-exp(A_log) * step`` and time step ``softplus(dt + dt_bias)``.

    The time step is clamped to ``limits``. Both results are float32 ``[T, HV]``.

    ``dt``: ``[T, HV]``; the heads of a token are contiguous, with any stride between tokens.
    ``A_log``, ``dt_bias``: ``[HV]``.
    """
    gate = dt.new_empty(dt.shape, dtype=torch.float32)
    step = dt.new_empty(dt.shape, dtype=torch.float32)
    if not dt.numel():
        return gate, step
    dt = dt if dt.stride(-1) == 1 else dt.contiguous()
    gates_kernel[(triton.cdiv(dt.numel(), BLOCK),)](
        dt,
        A_log,
        dt_bias,
        gate,
        step,
        dt.shape[0],
        dt.stride(0),
        *(float(limit) for limit in limits),
        HV=dt.shape[1],
        BLOCK=BLOCK,
    )
    return gate, step
