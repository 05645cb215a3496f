"""Mixture of experts with the products of ``native.cpp``; see ``reference``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from kernels.activation.native import relu_squared, sigmoid_mul, silu_and_mul
from kernels.linear import native as linear
from kernels.moe import reference
from kernels.moe.reference import (
    JOINS_SHARED,
    Product,
    experts,
    experts_8bit,
    is_gated,
    quantize_experts,
    weighted_sum,
)
from kernels.native import address, function, has
from kernels.recording import repeated

__all__ = [
    "JOINS_SHARED",
    "experts",
    "experts_8bit",
    "linear",
    "prepare",
    "prepare_8bit",
    "prepare_products",
    "quantize_experts",
    "route",
    "route_sigmoid",
    "weighted_sum",
]


def route(
    logits: torch.Tensor, k: int, renormalise: bool, live: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``reference.route``, in each repetition of a recording."""
    if not has("choose_experts") or (live is not None and live.dtype is not torch.int64):
        return _routed(logits, k, lambda: reference.route(logits, k, renormalise, live))
    num_rows, num_experts = logits.shape
    probabilities = logits.new_empty(num_rows, num_experts, dtype=torch.float32)
    weights = logits.new_empty(num_rows, k, dtype=torch.float32)
    experts = logits.new_empty(num_rows, k, dtype=torch.int32)
    repeated(lambda: probabilities.copy_(logits.float().softmax(dim=-1)))
    function("choose_experts", "piiipppt")(
        probabilities.data_ptr(), num_rows, num_experts, k, address(live), weights.data_ptr(),
        experts.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if renormalise:
        repeated(lambda: weights.div_(weights.sum(dim=-1, keepdim=True)))
    return weights, experts


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
    """Return ``reference.route_sigmoid``, in each repetition of a recording."""
    options = {"scale": scale, "eps": eps, "live": live}
    return _routed(
        logits, k, lambda: reference.route_sigmoid(logits, bias, k, renormalise, **options)
    )


def _routed(
    logits: torch.Tensor, k: int, choose: Callable[[], tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = logits.new_empty(len(logits), k, dtype=torch.float32)
    experts = logits.new_empty(len(logits), k, dtype=torch.int32)

    def write() -> None:
        for target, found in zip((weights, experts), choose(), strict=True):
            target.copy_(found)

    repeated(write)
    return weights, experts


def prepare(w13: torch.Tensor, w2: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Return ``reference.prepare`` with native products."""
    products = [
        (linear.prepare(up), linear.prepare(down)) for up, down in zip(w13, w2, strict=True)
    ]
    return prepare_products(products, is_gated(w13, w2))


def prepare_8bit(
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    dtype: torch.dtype,
    *,
    fp8_rows: bool = False,
) -> Callable[..., torch.Tensor]:
    """Return ``reference.prepare_8bit`` with native products."""
    prepare_one = partial(linear.prepare_8bit, bias=None, dtype=dtype, fp8_rows=fp8_rows)
    products = [
        (prepare_one(w13[e], w13_scale[e]), prepare_one(w2[e], w2_scale[e]))
        for e in range(len(w13))
    ]
    return prepare_products(products, is_gated(w13, w2))


def prepare_products(
    products: Sequence[tuple[Product, Product]], is_gated: bool
) -> Callable[..., torch.Tensor]:
    """Return ``reference.prepare_products``; in one call if all have native weights of one kind."""
    kinds = {type(one) for pair in products for one in pair}
    if len(kinds) == 1 and issubclass(kinds.pop(), linear.NativeProduct):
        return NativeExperts(products, is_gated)
    return reference.prepare_products(products, is_gated)


class NativeExperts:
    """Experts of native products without biases: the bits of ``reference.sum_of_products`` with
    native activations."""

    def __init__(
        self, products: Sequence[tuple[linear.NativeProduct, linear.NativeProduct]], is_gated: bool
    ) -> None:
        self._products, self._is_gated = products, is_gated
        self._weights = [
            torch.stack([one.description for one in part]) for part in zip(*products, strict=True)
        ]

    def __call__(
        self,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        experts: torch.Tensor,
        shared_gate: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute ``reference.experts``."""
        if hidden.stride(1) != 1:
            hidden = hidden.contiguous()
        out = hidden.new_empty(hidden.shape)
        weights, experts = weights.contiguous(), experts.contiguous()
        name = f"experts_{self._products[0][0].suffix(hidden.dtype)}"
        function(name, "piippippiipit")(
            hidden.data_ptr(), hidden.stride(0), len(hidden), weights.data_ptr(),
            experts.data_ptr(), experts.shape[1], *(part.data_ptr() for part in self._weights),
            len(self._products), self._is_gated, out.data_ptr(), out.stride(0),
            torch.get_num_threads(),
        )  # fmt: skip
        if shared_gate is None:
            return out
        up, down = self._products[-1]
        activate = silu_and_mul if self._is_gated else relu_squared
        return sigmoid_mul(down(activate(up(hidden))), shared_gate).add_(out)
