"""Rotary position embedding in plain PyTorch (Su et al., 2021), in the half-split form that Hugging
Face models use."""

from __future__ import annotations

import torch

from kernels.cache_write.reference import write_kv
from kernels.norm.reference import rms_norm


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


def rotate_and_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    indices: torch.Tensor,
    *,
    norms: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Normalise and rotate queries and keys, and write keys and values into the pools.

    Args:
        query, key, value: ``[T, HQ, D]``, and ``[T, HKV, D]`` for both others.
        key_pool, value_pool, indices: see ``kernels.cache_write.reference.write_kv``.
        norms: weights ``[D]`` of the norms of queries and keys over each head, with ``eps``. None
            if there are none.
        angles: cos and sin of ``rotate``, after the norms. None if nothing is rotated.

    Returns:
        The queries.
    """
    if norms is not None:
        query, key = (rms_norm(x, w, eps) for x, w in zip((query, key), norms, strict=True))
    if angles is not None:
        query, key = rotate(query, key, *angles)
    write_kv(key, value, key_pool, value_pool, indices)
    return query


def _rotate_one(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    num_rotated = cos.shape[-1]
    half = num_rotated // 2
    out = torch.empty_like(x)
    a, b = x[..., :half], x[..., half:num_rotated]
    out[..., :half] = a * cos[..., :half] - b * sin[..., :half]
    out[..., half:num_rotated] = b * cos[..., half:] + a * sin[..., half:]
    out[..., num_rotated:] = x[..., num_rotated:]
    return out
