"""Gates of Gated DeltaNet in Triton, for prompts. The decode kernel computes its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def softplus(b_x):
    """Compute ``log(1 + exp(x))`` of float32."""
    b_y = tl.exp(-tl.abs(b_x))
    # log(1 + y) by its series where 1 + y would round y away: slow decays consist of such y.
    b_series = b_y * (1.0 - b_y * (1.0 / 2 - b_y * (1.0 / 3 - b_y * (1.0 / 4))))
    b_log1p = tl.where(b_y < 0.03, b_series, tl.log(1.0 + b_y))
    return tl.maximum(b_x, 0.0) + b_log1p


@triton.jit
def compute_gates(b_a, b_b, b_A_log, b_dt_bias, max_beta):
    """Compute log-decay and step size of one block, in float32, as in `gates`."""
    b_step = softplus(b_a.to(tl.float32) + b_dt_bias.to(tl.float32))
    b_gate = -tl.exp(b_A_log.to(tl.float32)) * b_step
    return b_gate, max_beta / (1.0 + tl.exp(-b_b.to(tl.float32)))


@triton.jit(do_not_specialize=["num_tokens"])
def gates_kernel(
    p_a,
    p_b,
    p_A_log,
    p_dt_bias,
    p_gate,
    p_beta,
    num_tokens,
    stride_a,
    stride_b,
    max_beta,
    HV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i: computes BLOCK of the ``T * HV`` gates, in token order."""
    o_gate = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_gate < num_tokens * HV
    o_token, o_head = o_gate // HV, o_gate % HV
    b_gate, b_beta = compute_gates(
        tl.load(p_a + o_token * stride_a + o_head, mask=mask),
        tl.load(p_b + o_token * stride_b + o_head, mask=mask),
        tl.load(p_A_log + o_head, mask=mask),
        tl.load(p_dt_bias + o_head, mask=mask),
        max_beta,
    )
    tl.store(p_gate + o_gate, b_gate, mask=mask)
    tl.store(p_beta + o_gate, b_beta, mask=mask)


def gates(
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    *,
    max_beta: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log-decay ``-exp(A_log) * softplus(a + dt_bias)`` and step size ``max_beta *
    sigmoid(b)``.

    Both are float32 ``[T, HV]``. ``a``, ``b``: ``[T, HV]``; the heads of a token are contiguous,
    with any stride between tokens. ``A_log``, ``dt_bias``: ``[HV]``.
    """
    gate = a.new_empty(a.shape, dtype=torch.float32)
    beta = a.new_empty(a.shape, dtype=torch.float32)
    if not a.numel():
        return gate, beta
    a, b = (x if x.stride(-1) == 1 else x.contiguous() for x in (a, b))
    gates_kernel[(triton.cdiv(a.numel(), BLOCK),)](
        a,
        b,
        A_log,
        dt_bias,
        gate,
        beta,
        a.shape[0],
        a.stride(0),
        b.stride(0),
        max_beta,
        HV=a.shape[1],
        BLOCK=BLOCK,
    )
    return gate, beta
