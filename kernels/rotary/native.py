"""Rotary embedding with ``native.cpp``; see ``reference``."""

from __future__ import annotations

import torch

from kernels.cache_write.native import write_kv
from kernels.native import DTYPES, function, whole_rows
from kernels.norm.native import rms_norm
from kernels.rotary import reference

__all__ = ["rotate", "rotate_and_write"]


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute ``reference.rotate``, rounded once."""
    word = DTYPES.get(query.dtype)
    if word is None or not query.dtype is key.dtype is cos.dtype is sin.dtype:
        return reference.rotate(query, key, cos, sin)
    query, key = whole_rows(query), whole_rows(key)
    cos, sin = cos.contiguous(), sin.contiguous()
    out = query.new_empty(query.shape), key.new_empty(key.shape)
    num_tokens, num_heads, head_dim = query.shape
    function(f"rotate_{word}", "pipippppiiiii")(
        query.data_ptr(), query.stride(0), key.data_ptr(), key.stride(0), cos.data_ptr(),
        sin.data_ptr(), out[0].data_ptr(), out[1].data_ptr(), num_tokens, num_heads,
        key.shape[1], head_dim, cos.shape[1],
    )  # fmt: skip
    return out


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
    """Compute ``reference.rotate_and_write``."""
    if norms is not None:
        query, key = (rms_norm(x, w, eps) for x, w in zip((query, key), norms, strict=True))
    if angles is not None:
        query, key = rotate(query, key, *angles)
    write_kv(key, value, key_pool, value_pool, indices)
    return query
