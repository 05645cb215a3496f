"""Mixture of experts in plain PyTorch. A token's result does not depend on which others it is computed with."""

from __future__ import annotations

import torch

from kernels.activation.reference import silu_and_mul
from kernels.linear.reference import linear


def route(logits: torch.Tensor, k: int, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The k most probable experts of each token: softmax over all, then the top k; of equals the lower index.

    Args:
        logits: ``[T, E]``.
        renormalise: whether the k weights are divided by their sum.

    Returns:
        Weights float32 ``[T, k]`` in falling order, and experts int32 ``[T, k]``.
    """
    num_experts = logits.shape[-1]
    probabilities = logits.float().softmax(dim=-1)
    # Probabilities are not negative, so their bit patterns order as integers; the reversed index breaks ties.
    ranks = torch.arange(num_experts - 1, -1, -1, device=logits.device)
    keys = (probabilities.view(torch.int32).long() << 32) + ranks
    best = keys.topk(k, dim=-1).values
    experts = num_experts - 1 - (best & 0xFFFFFFFF)
    weights = probabilities.gather(-1, experts)
    if renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, experts.int()


def experts(
    hidden: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
) -> torch.Tensor:
    """``sum_i weights[t, i] * w2[e] (silu(a) * b)`` with ``(a, b) = w13[e] hidden[t]`` and ``e = experts[t, i]``.

    Args:
        hidden: ``[T, H]``.
        weights, experts: ``[T, k]``, from ``route``.
        w13: ``[E, 2I, H]``, gate rows above up rows; w2: ``[E, H, I]``.

    Returns:
        ``[T, H]`` in hidden's dtype, summed in float32 in the order of the k. O(T * k * H * I).
    """
    num_tokens, k = experts.shape
    flat = experts.reshape(-1)
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=len(w13)).tolist()
    grouped = hidden[order // k]
    results = hidden.new_empty(num_tokens * k, w2.shape[1])
    start = 0
    for expert, count in enumerate(counts):
        if count:
            rows = slice(start, start + count)
            inner = silu_and_mul(linear(grouped[rows], w13[expert]))
            results[order[rows]] = linear(inner, w2[expert])
            start += count
    return weighted_sum(results.view(num_tokens, k, -1), weights)


def weighted_sum(results: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``sum_i weights[t, i] * results[t, i]``: results ``[T, k, H]``, weights ``[T, k]``; float32 sum in the order of i."""
    total = results[:, 0].float() * weights[:, :1]
    for i in range(1, results.shape[1]):
        total.addcmul_(results[:, i].float(), weights[:, i : i + 1])
    return total.to(results.dtype)
