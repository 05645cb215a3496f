"""Routing in Triton, one program per token, and the sorting that follows it in the same launch."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.moe.sums import NO_EXPERT


class Sorting(NamedTuple):
    """Memory to sort pairs of T tokens and k choices by expert, passed to kernels as one argument.
    Pairs of an expert are in any order, which changes no result."""

    counts: torch.Tensor
    """int32 ``[E + 1]``: pairs of each expert, and routed tokens. Zero before and after."""
    ranks: torch.Tensor
    """int32 ``[T * k]``: number of each pair among those of its expert."""
    firsts: torch.Tensor
    """int32 ``[E]``: first row of each expert."""
    pairs: torch.Tensor | None
    block_experts: torch.Tensor
    block_count: torch.Tensor | None
    """These three are as in ``fused.RowBlocks``."""


@cache
def counts_of(num_experts: int, device: torch.device) -> torch.Tensor:
    """Return ``Sorting.counts`` of all layers, which are computed on one stream."""
    return torch.zeros(num_experts + 1, dtype=torch.int32, device=device)


@triton.jit(do_not_specialize=["num_tokens"])
def route_kernel(
    logits,
    bias,
    live,
    weights,
    experts,
    sorting,
    num_tokens,
    stride,
    scale,
    eps,
    K: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALISE: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_e, o_k = tl.arange(0, BE), tl.arange(0, BK)
    b_x = tl.load(logits + i_t * stride + o_e, mask=o_e < E, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        b_score = 1.0 / (1.0 + tl.exp(-b_x))  # [BE]
    else:
        b_score = tl.exp(b_x - tl.max(b_x, axis=0))
        b_score = b_score / tl.sum(b_score, axis=0)
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
        if SIGMOID:
            weight = tl.sum(tl.where(o_e == chosen, b_score, 0.0), axis=0)
        else:
            weight = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        b_weights = tl.where(o_k == i, weight, b_weights)
    if RENORMALISE:
        b_weights = b_weights / (tl.sum(b_weights, axis=0) + eps)
    if live is not None:
        b_experts = tl.where(tl.load(live + i_t) != 0, b_experts, NO_EXPERT)
    tl.store(weights + i_t * K + o_k, b_weights * scale, mask=o_k < K)
    tl.store(experts + i_t * K + o_k, b_experts, mask=o_k < K)
    if sorting is not None:
        mask = (o_k < K) & (b_experts != NO_EXPERT)
        b_rank = tl.atomic_add(sorting.counts + b_experts, 1, mask=mask, sem="relaxed")
        tl.store(sorting.ranks + i_t * K + o_k, b_rank, mask=mask)
        tl.debug_barrier()  # As in ``linear.fused.add_spans``.
        if tl.atomic_add(sorting.counts + E, 1, sem="acq_rel") == num_tokens - 1:
            place_pairs(sorting, experts, num_tokens * K, E, BE, BT)


@triton.jit
def place_pairs(sorting, experts, num_pairs, E: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr):
    """Turn counts into blocks of BT rows, pad the last one of each expert, write all pairs to their
    rows, and clear the counts."""
    o_e, o_t = tl.arange(0, BE), tl.arange(0, BT)
    b_count = tl.load(sorting.counts + o_e, mask=o_e < E, other=0, cache_modifier=".cg")
    b_blocks = (b_count + BT - 1) // BT  # [BE]
    b_first = tl.cumsum(b_blocks, axis=0) - b_blocks
    tl.store(sorting.firsts + o_e, b_first * BT, mask=o_e < E)
    tl.store(sorting.block_count, tl.sum(b_blocks, axis=0))
    for i in range(tl.max(b_blocks, axis=0)):
        tl.store(sorting.block_experts + b_first + i, o_e, mask=i < b_blocks)
    b_row = b_count[:, None] + o_t[None, :]
    p_row = sorting.pairs + (b_first * BT)[:, None] + b_row
    tl.store(p_row, num_pairs, mask=b_row < (b_blocks * BT)[:, None])
    tl.store(sorting.counts + o_e, 0, mask=o_e < E)
    tl.store(sorting.counts + E, 0)
    tl.debug_barrier()
    for start in range(0, num_pairs, 1024):
        o_p = start + tl.arange(0, 1024)
        m_p = o_p < num_pairs
        b_e = tl.load(experts + o_p, mask=m_p, other=NO_EXPERT, cache_modifier=".cg")
        m_p = b_e != NO_EXPERT
        b_rank = tl.load(sorting.ranks + o_p, mask=m_p, other=0, cache_modifier=".cg")
        b_place = tl.load(sorting.firsts + b_e, mask=m_p, other=0) + b_rank
        tl.store(sorting.pairs + b_place, o_p, mask=m_p)


def route(
    logits: torch.Tensor, k: int, renormalise: bool, live: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the k most probable experts of each token; see ``reference.route``.

    logits may be a view of wider rows. One launch.
    """
    return launch(logits, None, k, renormalise, live=live, is_sigmoid=False)


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
    return launch(logits, bias, k, renormalise, scale=scale, eps=eps, live=live)


def launch(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    k: int,
    renormalise: bool,
    *,
    scale: float = 1.0,
    eps: float = 0.0,
    live: torch.Tensor | None = None,
    is_sigmoid: bool = True,
    sorting: Sorting | None = None,
    rows: int = 16,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Route, and fill ``sorting`` with blocks of ``rows``, if it is given."""
    num_tokens, num_experts = logits.shape
    weights = torch.empty(num_tokens, k, dtype=torch.float32, device=logits.device)
    experts = torch.empty(num_tokens, k, dtype=torch.int32, device=logits.device)
    if num_tokens:
        route_kernel[(num_tokens,)](
            logits,
            bias,
            live,
            weights,
            experts,
            sorting,
            num_tokens,
            logits.stride(0),
            scale,
            eps,
            K=k,
            E=num_experts,
            BE=triton.next_power_of_2(num_experts),
            BK=triton.next_power_of_2(k),
            BT=rows,
            SIGMOID=is_sigmoid,
            RENORMALISE=renormalise,
        )
    return weights, experts
