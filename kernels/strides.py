"""Stride requirements of kernels: a token, a row or a slot is contiguous; their distance is free.

A pool can therefore be a separate tensor, or a view of memory that interleaves all layers.
"""

from __future__ import annotations

import torch


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """Return x if each row (token) is contiguous, for any stride between rows; else a copy."""
    return x if x[:1].is_contiguous() else x.contiguous()


def row_stride(what: str, *pools: torch.Tensor) -> int:
    """Return the number of elements between two rows of the pools ``[N, ...]``.

    Raises:
        ValueError: rows are not contiguous or the pools have different layouts. A copy is no
            alternative, because pools are changed in place. ``what`` names a row in the message.
    """
    strides = pools[0].stride()
    if any(pool.stride() != strides or not pool[:1].is_contiguous() for pool in pools):
        raise ValueError(f"{what} must be contiguous and have equal strides in all pools")
    return strides[0]
