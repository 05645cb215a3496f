"""Routing by sigmoids in Triton, one program per token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.moe.sums import NO_EXPERT


@triton.jit
def route_sigmoid_kernel(
    logits,
    bias,
    live,
    weights,
    experts,
    stride,
    scale,
    eps,
    K: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    BK: tl.constexpr,
    RENORMALISE: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_e, o_k = tl.arange(0, BE), tl.arange(0, BK)
    b_x = tl.load(logits + i_t * stride + o_e, mask=o_e < E, other=0.0).to(tl.float32)
    b_score = 1.0 / (1.0 + tl.exp(-b_x))  # [BE]
    b_choice = b_score
    if bias is not None:
        b_choice += tl.load(bias + o_e, mask=o_e < E, other=0.0)
    # Bit patterns of floats sort as integers if those of negative floats are inverted. The reversed
    # index breaks ties.
    b_bits = b_choice.to(tl.int32, bitcast=True)
    b_bits = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    b_key = (b_bits.to(tl.int64) << 32) | (BE - 1 - o_e)
    least = -(2**63)
    b_key = tl.where(o_e < E, b_key, least)
    b_weights = tl.zeros([BK], tl.float32)
    b_experts = tl.zeros([BK], tl.int32)
    for i in tl.static_range(K):
        best = tl.max(b_key, axis=0)
        b_key = tl.where(b_key == best, least, b_key)
        # NaN has arbitrary bits: any choice is acceptable, but it must be a valid expert.
        chosen = tl.minimum(tl.maximum(BE - 1 - (best & 0xFFFFFFFF), 0), E - 1).to(tl.int32)
        b_experts = tl.where(o_k == i, chosen, b_experts)
        weight = tl.sum(tl.where(o_e == chosen, b_score, 0.0), axis=0)
        b_weights = tl.where(o_k == i, weight, b_weights)
    if RENORMALISE:
        b_weights = b_weights / (tl.sum(b_weights, axis=0) + eps)
    if live is not None:
        b_experts = tl.where(tl.load(live + i_t) != 0, b_experts, NO_EXPERT)
    tl.store(weights + i_t * K + o_k, b_weights * scale, mask=o_k < K)
    tl.store(experts + i_t * K + o_k, b_experts, mask=o_k < K)


def route_sigmoid(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    k: int,
    renormalise: bool,
    *,
    scale: float = 1.0,
    eps: float = 1e-20,
    live: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the k experts of each token with the highest ``sigmoid(logit) + bias``.

    See ``reference.route_sigmoid``. logits may be a view of wider rows. One launch.
    """
    num_tokens, num_experts = logits.shape
    weights = torch.empty(num_tokens, k, dtype=torch.float32, device=logits.device)
    experts = torch.empty(num_tokens, k, dtype=torch.int32, device=logits.device)
    if num_tokens:
        route_sigmoid_kernel[(num_tokens,)](
            logits,
            bias,
            live,
            weights,
            experts,
            logits.stride(0),
            scale,
            eps,
            K=k,
            E=num_experts,
            BE=triton.next_power_of_2(num_experts),
            BK=triton.next_power_of_2(k),
            RENORMALISE=renormalise,
        )
    return weights, experts
