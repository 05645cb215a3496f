"""Mixture of experts in plain PyTorch. A token's result does not depend on its batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from kernels.activation.reference import relu_squared, sigmoid, sigmoid_mul, silu_and_mul
from kernels.linear import reference as linear
from kernels.linear.reference import STORAGE, Format, quantize

JOINS_SHARED = False
"""True if a shared expert that is as large as the others is faster as the last of them than by
itself."""

NO_EXPERT = -1
"""Expert of padding rows, which read no weight of a routed expert and get zeros from them."""


def route(
    logits: torch.Tensor, k: int, renormalise: bool, live: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the k most probable experts of each token: softmax over all experts, then the top k.

    Ties go to the lower index.

    Args:
        logits: ``[T, E]``.
        renormalise: True to divide the k weights by their sum.
        live: ``[T]``, zero for padding rows, which get ``NO_EXPERT``. None if there are none.

    Returns:
        Weights float32 ``[T, k]`` in descending order, and experts int32 ``[T, k]``.
    """
    num_experts = logits.shape[-1]
    probabilities = logits.float().softmax(dim=-1)
    # Probabilities are not negative, so their bit patterns order as integers; the reversed index
    # breaks ties.
    ranks = torch.arange(num_experts - 1, -1, -1, device=logits.device)
    keys = (probabilities.view(torch.int32).long() << 32) + ranks
    best = keys.topk(k, dim=-1).values
    experts = num_experts - 1 - (best & 0xFFFFFFFF)
    weights = probabilities.gather(-1, experts)
    if renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, _of_live(experts, live)


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

    Ties go to the lower index. The bias affects only the choice: weights are the sigmoids, times
    ``scale``.

    Args:
        logits: ``[T, E]``. bias: float32 ``[E]`` or None.
        renormalise: True to divide the k weights by their sum plus ``eps``.
        live: As in ``route``.

    Returns:
        Weights float32 ``[T, k]`` and experts int32 ``[T, k]``, by descending score.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2.
    """
    scores = sigmoid(logits)
    chosen_by = scores if bias is None else scores + bias
    experts = chosen_by.argsort(dim=-1, descending=True, stable=True)[:, :k]
    weights = scores.gather(-1, experts)
    if renormalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + eps)
    return weights * scale, _of_live(experts, live)


def _of_live(experts: torch.Tensor, live: torch.Tensor | None) -> torch.Tensor:
    experts = experts.int()
    return experts if live is None else experts.masked_fill(live[:, None] == 0, NO_EXPERT)


Product = Callable[[torch.Tensor], torch.Tensor]
"""Linear layer with a bound weight."""


def experts(
    hidden: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    shared_gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute ``sum_i weights[t, i] * w2[e] (silu(a) * b)`` with ``(a, b) = w13[e] hidden[t]``.

    ``e`` is ``experts[t, i]``. Without gates it is ``w2[e] relu(w13[e] hidden[t])^2``.

    Args:
        hidden: ``[T, H]``.
        weights, experts: ``[T, k]``, from ``route``.
        w13: ``[E, 2I, H]``, gate rows above up rows, or ``[E, I, H]`` without gates; w2: ``[E, H,
            I]``.
        shared_gate: ``[T, 1]`` to compute the last expert for all tokens and add its output times
            ``sigmoid(shared_gate)``. It is then not one of ``experts``.

    Returns:
        ``[T, H]`` in hidden's dtype, summed in float32 in the order of the k. O(T * k * H * I).
    """
    products = [
        (partial(linear.linear, weight=up), partial(linear.linear, weight=down))
        for up, down in zip(w13, w2, strict=True)
    ]
    return prepare_products(products, is_gated(w13, w2))(hidden, weights, experts, shared_gate)


def prepare(w13: torch.Tensor, w2: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Return ``experts`` with these weights in the fastest form.

    The result maps (hidden, weights, experts, shared_gate=None) to ``[T, H]``.
    """
    products = [
        (linear.prepare(up), linear.prepare(down)) for up, down in zip(w13, w2, strict=True)
    ]
    return prepare_products(products, is_gated(w13, w2))


def prepare_products(
    products: Sequence[tuple[Product, Product]], is_gated: bool
) -> Callable[..., torch.Tensor]:
    """Return ``experts`` with two products per expert, which have its weights.

    Args:
        products: of each expert, from ``[T, H]`` to ``[T, 2I]`` with gates and ``[T, I]`` without,
            and from ``[T, I]`` to ``[T, H]``.
        is_gated: True for SiLU with gates, False for squared ReLU.
    """
    activate = silu_and_mul if is_gated else relu_squared
    return partial(sum_of_products, products=products, activate=activate)


def experts_8bit(
    hidden: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    shared_gate: torch.Tensor | None = None,
    *,
    fp8_rows: bool = False,
) -> torch.Tensor:
    """Compute ``experts`` with 8-bit weights of ``kernels.linear.reference.quantize``.

    Scales are ``[E, 2I]`` and ``[E, H]``, or have blocks of a row as in ``linear_8bit``. With
    ``fp8_rows``, the inputs of both products are in fp8, as in ``linear_fp8``.
    """
    product = linear.linear_fp8 if fp8_rows else linear.linear_8bit
    products = [
        (
            partial(product, quantized=w13[e], scale=w13_scale[e]),
            partial(product, quantized=w2[e], scale=w2_scale[e]),
        )
        for e in range(len(w13))
    ]
    return prepare_products(products, is_gated(w13, w2))(hidden, weights, experts, shared_gate)


def prepare_8bit(
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    dtype: torch.dtype,
    *,
    fp8_rows: bool = False,
) -> Callable[..., torch.Tensor]:
    """Return ``experts_8bit`` with these weights, for hidden states of ``dtype``.

    See ``linear.reference.prepare_8bit``.
    """
    prepare_one = partial(linear.prepare_8bit, bias=None, dtype=dtype, fp8_rows=fp8_rows)
    products = [
        (prepare_one(w13[e], w13_scale[e]), prepare_one(w2[e], w2_scale[e]))
        for e in range(len(w13))
    ]
    return prepare_products(products, is_gated(w13, w2))


def quantize_experts(weights: torch.Tensor, format: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise ``[E, M, N]`` without a float32 copy of the whole tensor."""
    quantized = torch.empty(weights.shape, dtype=STORAGE[format][0], device=weights.device)
    scale = torch.empty(weights.shape[:2], dtype=torch.float32, device=weights.device)
    for expert, weight in enumerate(weights):
        quantized[expert], scale[expert] = quantize(weight, format)
    return quantized, scale


def sum_of_products(
    hidden: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    shared_gate: torch.Tensor | None = None,
    *,
    products: Sequence[tuple[Product, Product]],
    activate: Product,
) -> torch.Tensor:
    """Compute ``experts`` with the given two products per expert."""
    num_tokens, k = experts.shape
    flat = experts.reshape(-1)
    order = flat.argsort(stable=True)
    start, *counts = (flat + 1).bincount(minlength=len(products) + 1).tolist()
    grouped = hidden[order // k]
    results = torch.empty_like(grouped)
    if start:  # Pairs without an expert come first.
        results[order[:start]] = 0.0
    for (up, down), count in zip(products, counts, strict=True):
        if count:
            rows = slice(start, start + count)
            results[order[rows]] = down(activate(up(grouped[rows])))
            start += count
    total = weighted_sum(results.view(num_tokens, k, hidden.shape[1]), weights)
    if shared_gate is None:
        return total
    up, down = products[-1]
    return sigmoid_mul(down(activate(up(hidden))), shared_gate).add_(total)


def is_gated(w13: torch.Tensor, w2: torch.Tensor) -> bool:
    """Return True if the first weight has a gate row per up row."""
    return w13.shape[1] == 2 * w2.shape[2]


def weighted_sum(results: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Compute ``sum_i weights[t, i] * results[t, i]``, in float32 and in the order of i.

    results: ``[T, k, H]``; weights: ``[T, k]``.
    """
    total = results[:, 0].float() * weights[:, :1]
    for i in range(1, results.shape[1]):
        total.addcmul_(results[:, i].float(), weights[:, i : i + 1])
    return total.to(results.dtype)
