"""Weights in the blocked layout of oneDNN: the CPU's fast linear layer.

Rows are multiplied in blocks of one size, so the shape of a call does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

ROWS = 16
"""Rows of every product. Fewer rows are padded, and more are split."""


def by_blocks(product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Compute ``product`` of x ``[T, ...]`` by blocks of ``ROWS`` rows, the last one padded."""
    num_rows = len(x)
    missing = -num_rows % ROWS
    if missing or not num_rows:
        x = torch.cat([x, x.new_zeros(missing or ROWS, *x.shape[1:])])
    blocks = [product(rows) for rows in x.split(ROWS)]
    return (blocks[0] if len(blocks) == 1 else torch.cat(blocks))[:num_rows]


def is_available(weight: torch.Tensor) -> bool:
    """Return True if this build of PyTorch can prepack ``weight``."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and has_products(weight)
    )


def has_products(x: torch.Tensor) -> bool:
    """Return True if PyTorch has vectorised products of matrices of this dtype and device. On a CPU
    without AVX-512 those of bfloat16 and float16 are loops over elements."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return True
    word = "bf16" if x.dtype is torch.bfloat16 else "fp16"
    is_supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{word}_supported", None)
    return is_supported is not None and is_supported()


class PrepackedLinear:
    """Linear layer ``x @ weight.T + bias`` for x ``[T, N]``. weight ``[M, N]`` is copied."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        self._bias = bias
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return by_blocks(self._product, x)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        return self._multiply(rows, self._weight, self._bias, "none", [], "")
