"""Gates of Kimi Delta Attention in Triton, for prompts. The decode kernel computes its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gdn.gates import compute_gates
from kernels.strides import rows_contiguous

BLOCK = 1024


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
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i: computes BLOCK of the ``T * H * K`` decays, in token order.

    It also computes the step sizes of the heads with their first channel in its block.
    """
    o_gate = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_gate < num_tokens * H * K
    o_token, o_channel = o_gate // (H * K), o_gate % (H * K)
    o_head = o_channel // K
    b_gate, b_beta = compute_gates(
        tl.load(p_a + o_token * stride_a + o_channel, mask=mask),
        tl.load(p_b + o_token * stride_b + o_head, mask=mask),
        tl.load(p_A_log + o_head, mask=mask),
        tl.load(p_dt_bias + o_channel, mask=mask),
        1.0,
    )
    tl.store(p_gate + o_gate, b_gate, mask=mask)
    tl.store(p_beta + o_token * H + o_head, b_beta, mask=mask & (o_channel % K == 0))


def gates(
    a: torch.Tensor, b: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log-decay and step size. One launch.

    The log-decay ``-exp(A_log) * softplus(a + dt_bias)`` is float32 ``[T, H, K]``. The step size
    ``sigmoid(b)`` is float32 ``[T, H]``.

    ``a``: ``[T, H, K]``. ``b``: ``[T, H]``. Each token is contiguous, with any stride between
    tokens. ``A_log``: ``[H]``. ``dt_bias``: ``[H, K]``.
    """
    a, b = rows_contiguous(a), rows_contiguous(b)
    gate = a.new_empty(a.shape, dtype=torch.float32)
    beta = b.new_empty(b.shape, dtype=torch.float32)
    if a.numel():
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
            H=a.shape[1],
            K=a.shape[2],
            BLOCK=BLOCK,
        )
    return gate, beta
