"""Linear layers in eight bits on both sides (W8A8), in plain PyTorch on the CPU.

Each row of activations is quantised by itself, weights are by output channel, and products are
summed in integers::

    y[t, m] = (sum_n q[t, n] w[m, n]) * weight_scale[m] * row_scale[t] + bias[m]

Integer sums are exact in any order: so every way of multiplying gives the same bits, rows need no
padding, and a layer may take whichever way is fast for a number of rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

LARGEST = 127.0
EXACT_SPAN = 1024
"""So many products of int8 have a sum that float32 holds exactly, whatever the order."""
MAX_SINGLE_ROWS = 32
"""More rows than these are never multiplied one by one."""
MEASURED_CALLS = 3


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x ``[T, N]`` as int8 ``[T, N]`` and the float32 scale of each row ``[T]``: ``x ~ q * scale[:,
    None]``, rounded to nearest even."""
    x = x.float()
    scale = x.abs().amax(dim=1).clamp_(min=torch.finfo(torch.float32).tiny).div_(LARGEST)
    return (x / scale[:, None]).round_().to(torch.int8), scale


class Int8Linear:
    """``x @ (quantized * scale).T + bias`` for x ``[T, N]``, which is quantised on the way."""

    def __init__(
        self, quantized: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """quantized: int8 ``[M, N]``; scale: float32 ``[M]``; bias: ``[M]`` or None."""
        self._weight = quantized.contiguous().t()
        self._scale, self._bias = scale, None if bias is None else bias.float()
        self._multiply: Product = torch._int_mm if is_exact() else multiply_by_spans
        num_outputs, size = quantized.shape
        self._single_rows = single_rows(num_outputs, size, torch.get_num_threads())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) == 0:
            return x.new_empty(0, self._weight.shape[1])
        rows, scale = quantize_rows(x)
        if 1 < len(rows) <= self._single_rows:
            sums = torch.cat([self._multiply(row[None], self._weight) for row in rows])
        else:
            sums = self._multiply(rows, self._weight)
        out = sums.float().mul_(self._scale).mul_(scale[:, None])
        if self._bias is not None:
            out += self._bias
        return out.to(x.dtype)


def multiply_by_spans(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int8 ``rows [T, N] @ weight [N, M]`` as int32, from float32 products of so few elements that
    nothing is rounded. Widens the weight at every call."""
    sums = torch.zeros(len(rows), weight.shape[1], dtype=torch.int32)
    for part, span in zip(rows.split(EXACT_SPAN, 1), weight.split(EXACT_SPAN), strict=True):
        sums += (part.float() @ span.float()).int()
    return sums


@cache
def is_exact() -> bool:
    """Whether ``torch._int_mm`` is exact here: on processors without the instructions for it sums
    of two products may saturate at 16 bits."""
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
def single_rows(num_outputs: int, size: int, num_threads: int) -> int:
    """Up to how many rows it is faster to multiply them one by one, measured once for each shape.
    Only speed hangs on it."""
    if not is_exact():
        return 0
    weight = torch.ones(num_outputs, size, dtype=torch.int8).t()
    rows = torch.ones(MAX_SINGLE_ROWS, size, dtype=torch.int8)
    one = _shortest_s(rows[:1], weight)
    count = 1
    while count < MAX_SINGLE_ROWS and 2 * count * one < _shortest_s(rows[: 2 * count], weight):
        count *= 2
    return count


def _shortest_s(rows: torch.Tensor, weight: torch.Tensor) -> float:
    def call() -> float:
        start = time.perf_counter()
        torch._int_mm(rows, weight)
        return time.perf_counter() - start

    return min(call() for _ in range(MEASURED_CALLS))
