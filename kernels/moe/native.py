"""Mixture of experts with the products of ``native.cpp``; see ``reference``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from kernels.linear import native as linear
from kernels.moe.reference import (
    JOINS_SHARED,
    experts,
    experts_8bit,
    is_gated,
    prepare_products,
    quantize_experts,
    route,
    route_sigmoid,
    weighted_sum,
)

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
