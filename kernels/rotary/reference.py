"""Rotary position embedding in plain PyTorch (Su et al., 2021), in the half-split form that Hugging
Face models use."""

from __future__ import annotations

import torch


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the first R of each head's D dimensions by its token's angles, and copy the others.

        (a, b) -> (a cos - b sin, b cos + a sin)      a, b: the two halves of the first R dimensions

    Args:
        query, key: ``[T, HQ, D]`` and ``[T, HKV, D]``. cos, sin: ``[T, R]``, R even and at most D;
        both halves of the R columns are equal.

    Returns:
        New tensors of the same shapes and dtypes; computed in the wider of the two dtypes.
    """
    cos, sin = cos[:, None], sin[:, None]
    return _rotate_one(query, cos, sin), _rotate_one(key, cos, sin)


def _rotate_one(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    num_rotated = cos.shape[-1]
    half = num_rotated // 2
    out = torch.empty_like(x)
    a, b = x[..., :half], x[..., half:num_rotated]
    out[..., :half] = a * cos[..., :half] - b * sin[..., :half]
    out[..., half:num_rotated] = b * cos[..., half:] + a * sin[..., half:]
    out[..., num_rotated:] = x[..., num_rotated:]
    return out
