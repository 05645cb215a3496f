"""Linear layers in plain PyTorch, with rows independent of the batch.

A library chooses its code by the shape of a product. So rows are multiplied ``ROWS`` at a time: the
shape of every call is the same for any number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

from kernels.linear import prepacked
from kernels.linear.int8 import Int8Linear

ROWS = prepacked.ROWS

Format = Literal["int8", "fp8"]

STORAGE: dict[Format, tuple[torch.dtype, float]] = {
    "int8": (torch.int8, 127.0),
    "fp8": (torch.float8_e4m3fn, 448.0),
}
"""Dtype of each 8-bit format, and the magnitude that the largest value is scaled to."""

SCALE_BLOCK = 128
"""Elements of a row that share a scale, if a row has more than one."""

PRODUCTS: frozenset[tuple[Format, int | None]] = frozenset({("int8", None)})
"""8-bit weights that are multiplied without widening: format, and elements per scale (None for one
scale per row). Others are faster if widened once."""


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute ``x @ weight.T + bias``: x ``[T, N]``, weight ``[M, N]``, bias ``[M]``."""
    return prepacked.by_blocks(lambda rows: F.linear(rows, weight, bias), x)


def prepare(
    weight: torch.Tensor, bias: torch.Tensor | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return ``linear`` with this weight in the fastest form: x ``[T, N]`` to ``[T, M]``."""
    if prepacked.is_available(weight):
        return prepacked.PrepackedLinear(weight, bias)
    return partial(linear, weight=weight, bias=bias)


def quantize(weight: torch.Tensor, format: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise weights to 8 bits with one scale per output channel, symmetric.

    ``weight ~ quantised * scale[..., None]``

    Args:
        weight: ``[..., M, N]``.

    Returns:
        The quantised weight of the same shape, and the float32 scales ``[..., M]``. Rounding is to
        nearest even.
    """
    dtype, largest = STORAGE[format]
    weight = weight.float()
    scale = weight.abs().amax(dim=-1).clamp_(min=torch.finfo(torch.float32).tiny) / largest
    scaled = weight / scale[..., None]
    if dtype is torch.int8:
        scaled = scaled.round_()
    return scaled.clamp_(-largest, largest).to(dtype), scale


def join(products: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> Callable[..., torch.Tensor]:
    """Return the product with the outputs of all ``products``, one after the other: ``[T, sum of
    M]``."""
    if len(products) == 1:
        return products[0]
    return lambda x: torch.cat([product(x) for product in products], dim=-1)


def linear_8bit(
    x: torch.Tensor,
    quantized: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute ``x @ (quantized * scale).T + bias`` in x's dtype, with full-precision activations.

    Weights are widened during the product.

    Args:
        x: ``[T, N]``; quantized: int8 or float8_e4m3fn ``[M, N]``; bias: ``[M]`` or None.
        scale: float32 ``[M]``, or ``[M, ceil(N / SCALE_BLOCK)]`` with one per block of a row.

    Returns:
        ``[T, M]``.
    """
    if scale.ndim == 2:
        return linear(x, widened(quantized, scale, x.dtype), bias)
    out = linear(x, quantized.to(x.dtype)).float().mul_(scale)
    if bias is not None:
        out += bias
    return out.to(x.dtype)


def prepare_8bit(
    quantized: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return ``linear_8bit`` with this weight, for x of ``dtype``.

    On a CPU, int8 weights use int8 activations (``int8.Int8Linear``). Formats that are not in
    ``PRODUCTS`` are widened here, once.
    """
    if quantized.device.type != "cpu":
        return partial(linear_8bit, quantized=quantized, scale=scale, bias=bias)
    if quantized.dtype is torch.int8 and scale.ndim == 1:
        return Int8Linear(quantized, scale, bias)
    return prepare(widened(quantized, scale, dtype), bias)


def widened(quantized: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Compute ``quantized * scale`` in float32, rounded once; see ``linear_8bit``."""
    scale = scale[:, None] if scale.ndim == 1 else scale.repeat_interleave(SCALE_BLOCK, dim=1)
    return (quantized.float() * scale[:, : quantized.shape[1]]).to(dtype)
