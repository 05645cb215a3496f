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
        and (weight.dtype is torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


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
