"""Linear layers with 8-bit weights and activations (W8A8), in plain PyTorch on the CPU.

Each row of activations is quantised separately, weights per output channel, and products are summed
as integers::

    y[t, m] = (sum_n q[t, n] w[m, n]) * weight_scale[m] * row_scale[t] + bias[m]

Integer sums are exact in any order. All methods of multiplication therefore give the same bits, and
rows need no padding. A layer may use the fastest method for a number of rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

LARGEST = 127.0
MIN_LARGEST = 1e-30
"""Lower bound of a row's largest magnitude, which keeps the row's scale from being subnormal."""
EXACT_SPAN = 1024
"""Number of int8 products with a sum that is exact in float32 in any order."""
MAX_SINGLE_ROWS = 32
"""Maximum number of rows that are multiplied one at a time."""
MANY_ROWS = 8
"""Number of rows with which the products of many rows are compared."""
MEASURED_CALLS = 3


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise x ``[T, N]`` to int8 with one float32 scale per row ``[T]``.

    ``x ~ q * scale[:, None]``, rounded to nearest even.
    """
    x = x.float()
    scale = x.abs().amax(dim=1).clamp_(min=MIN_LARGEST).div_(LARGEST)
    return (x / scale[:, None]).round_().to(torch.int8), scale


class Int8Linear:
    """Linear layer ``x @ (quantized * scale).T + bias`` for x ``[T, N]``, which is quantised."""

    def __init__(
        self, quantized: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """Create the layer. quantized: int8 ``[M, N]``; scale: float32 ``[M]``; bias: ``[M]``."""
        self._weight = quantized.contiguous().t()
        self._scale, self._bias = scale, None if bias is None else bias.float()
        shape = *quantized.shape, torch.get_num_threads()
        self._multiply: Product = multiply_by_spans
        self._single_rows = 0
        if is_exact() and quantized.shape[1] > 1:  # One input: torch returns memory as it is.
            self._multiply, self._single_rows = product_of_many(*shape), single_rows(*shape)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) == 0:
            return x.new_empty(0, self._weight.shape[1])
        rows, scale = quantize_rows(x)
        if len(rows) <= self._single_rows:
            sums = torch.cat([torch._int_mm(row[None], self._weight) for row in rows])
        else:
            sums = self._multiply(rows, self._weight)
        out = sums.float().mul_(self._scale).mul_(scale[:, None])
        if self._bias is not None:
            out += self._bias
        return out.to(x.dtype)


def multiply_by_spans(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute int8 ``rows [T, N] @ weight [N, M]`` as int32, by exact float32 products of spans.

    Widens the weight at every call.
    """
    sums = torch.zeros(len(rows), weight.shape[1], dtype=torch.int32)
    for part, span in zip(rows.split(EXACT_SPAN, 1), weight.split(EXACT_SPAN), strict=True):
        sums += (part.float() @ span.float()).int()
    return sums


@cache
def is_exact() -> bool:
    """Return True if ``torch._int_mm`` is exact on this processor.

    Without special instructions, sums of two products can saturate at 16 bits.
    """
    size = 256
    signs = torch.ones(size, dtype=torch.int8)
    signs[1::2] = -1
    rows = torch.stack(
        [torch.full((size,), value, dtype=torch.int8) for value in (127, -127, -128)]
    )
    weight = torch.stack([rows[0], rows[1], rows[2], 127 * signs])
    exact = (rows.long() @ weight.long().t()).int()
    try:
        return torch.equal(torch._int_mm(rows, weight.t()), exact) and all(
            torch.equal(torch._int_mm(row[None], weight.t())[0], sums)
            for row, sums in zip(rows, exact, strict=True)
        )
    except RuntimeError:
        return False


@cache
def product_of_many(num_outputs: int, size: int, num_threads: int) -> Product:
    """Return the fastest product of many rows. Affects speed only; measured once per shape.

    Without special instructions, ``torch._int_mm`` takes up to 17 times as long as spans.
    """
    weight = torch.ones(num_outputs, size, dtype=torch.int8).t()
    rows = torch.ones(MANY_ROWS, size, dtype=torch.int8)
    products: tuple[Product, ...] = torch._int_mm, multiply_by_spans
    return min(products, key=lambda product: _shortest_s(product, rows, weight))


@cache
def single_rows(num_outputs: int, size: int, num_threads: int) -> int:
    """Return the number of rows up to which one at a time is faster. Affects speed only.

    Measured once per shape.
    """
    weight = torch.ones(num_outputs, size, dtype=torch.int8).t()
    rows = torch.ones(MAX_SINGLE_ROWS, size, dtype=torch.int8)
    many = product_of_many(num_outputs, size, num_threads)
    one = _shortest_s(torch._int_mm, rows[:1], weight)
    count = 1
    while count < MAX_SINGLE_ROWS and 2 * count * one < _shortest_s(
        many, rows[: 2 * count], weight
    ):
        count *= 2
    return count


def _shortest_s(product: Product, rows: torch.Tensor, weight: torch.Tensor) -> float:
    def call() -> float:
        start = time.perf_counter()
        product(rows, weight)
        return time.perf_counter() - start

    return min(call() for _ in range(MEASURED_CALLS))
