"""Rotary embedding with ``native.cpp``; see ``reference``."""

from __future__ import annotations

import torch

from kernels.native import DTYPES, function, whole_rows
from kernels.rotary import reference

__all__ = ["rotate"]


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
