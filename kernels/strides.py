"""What kernels ask of strides: a token, a row, a slot is contiguous; the next may lie anywhere.

So a pool may be a tensor of its own, or a view of memory that holds all layers side by side.
"""

from __future__ import annotations

import torch


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x itself if what belongs to one row (a token) is contiguous, whatever the stride between
    rows; else a copy."""
    return x if x[:1].is_contiguous() else x.contiguous()


def row_stride(what: str, *pools: torch.Tensor) -> int:
    """Elements between two rows of the pools ``[N, ...]``, which have one layout.

    Raises ValueError, naming ``what`` a row is, for one that is not contiguous: a pool is changed
    in place, so a copy would not do.
    """
    strides = pools[0].stride()
    if any(pool.stride() != strides or not pool[:1].is_contiguous() for pool in pools):
        raise ValueError(f"{what} must be contiguous, in one layout for all pools")
    return strides[0]
