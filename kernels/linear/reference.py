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
from kernels.linear.formats import Matrix
from kernels.linear.int8 import Int8Linear
from kernels.recording import repeated

ROWS = prepacked.ROWS

Format = Literal["int8", "fp8"]

STORAGE: dict[Format, tuple[torch.dtype, float]] = {
    "int8": (torch.int8, 127.0),
    "fp8": (torch.float8_e4m3fn, 448.0),
}
"""Dtype of each 8-bit format, and the magnitude that the largest value is scaled to."""

SCALE_BLOCK = 128
"""Elements of a row that share a scale, if a row has more than one."""

LEAST_LARGEST = 448.0 * torch.finfo(torch.float32).tiny
"""Least value to which the largest activation of a block is raised, so that scales are normal."""

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


def look_up(matrix: Matrix, index: torch.Tensor, out: torch.Tensor) -> None:
    """Write the rows ``index`` (int64 ``[T]``) of a stored matrix to ``out [T, N]`` (contiguous),
    widened."""

    def write(index: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(matrix[index].widened(out.dtype))

    repeated(write, index, out)


def linear_8bit(
    x: torch.Tensor, quantized: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
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


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise activations to fp8 with a scale per ``SCALE_BLOCK`` elements of a row.

    The largest element of a block becomes 448. An element of size ``a`` has an error of at most
    ``max(a / 16, scale / 1024)``: half a unit of the last of four digits, or of the least number.

    Args:
        x: ``[T, N]``.

    Returns:
        float8_e4m3fn ``[T, N]``, and float32 scales ``[T, ceil(N / SCALE_BLOCK)]``.
    """
    blocks = F.pad(x.float(), (0, -x.shape[1] % SCALE_BLOCK)).unflatten(1, (-1, SCALE_BLOCK))
    scale = blocks.abs().amax(dim=-1).clamp_(min=LEAST_LARGEST) * (1.0 / STORAGE["fp8"][1])
    quantized = (blocks / scale[..., None]).to(torch.float8_e4m3fn)
    return quantized.flatten(1)[:, : x.shape[1]], scale


def linear_fp8(
    x: torch.Tensor, quantized: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute ``linear_8bit`` with fp8 weights and activations of ``quantize_rows``.

    The product of each block is exact, and rounded once to float32. With ``w = quantized * scale``
    and ``s[t, n]`` the scale of the block of ``x[t, n]``, the result differs from ``x @ w.T`` by at
    most ``sum_n |w[m, n]| * max(|x[t, n]| / 16, s[t, n] / 1024)``, plus one rounding per block and
    that of the result. Tensor cores may add products of a block with 14 bits only (Hopper), which
    adds ``2**-13 * sum_n |w[m, n] * x[t, n]|``.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.
    """
    rows, row_scale = quantize_rows(x)
    total = torch.zeros(len(x), len(quantized), device=x.device)
    for block, first in enumerate(range(0, x.shape[1], SCALE_BLOCK)):
        part = slice(first, first + SCALE_BLOCK)
        product = (rows[:, part].double() @ quantized[:, part].double().T).float()
        factor = scale if scale.ndim == 1 else scale[:, block]
        total += product * row_scale[:, block, None] * factor
    if bias is not None:
        total += bias
    return total.to(x.dtype)


def prepare_8bit(
    quantized: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    fp8_rows: bool = False,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return ``linear_8bit`` with this weight, for x of ``dtype``.

    On a CPU, int8 weights use int8 activations (``int8.Int8Linear``). Formats that are not in
    ``PRODUCTS`` are widened here, once. With ``fp8_rows`` it is ``linear_fp8``.
    """
    if fp8_rows:
        return partial(linear_fp8, quantized=quantized, scale=scale, bias=bias)
    if quantized.device.type != "cpu":
        return partial(linear_8bit, quantized=quantized, scale=scale, bias=bias)
    if quantized.dtype is torch.int8 and scale.ndim == 1:
        return Int8Linear(quantized, scale, bias)
    return prepare(widened(quantized, scale, dtype), bias)


def widened(quantized: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Compute ``quantized * scale`` in float32, rounded once; see ``linear_8bit``."""
    scale = scale[:, None] if scale.ndim == 1 else scale.repeat_interleave(SCALE_BLOCK, dim=1)
    return (quantized.float() * scale[:, : quantized.shape[1]]).to(dtype)
