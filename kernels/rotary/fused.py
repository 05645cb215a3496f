"""Rotary position embedding in Triton, with the norms before it and the writes of KV rows after it.

One program per token and head, so that a single token has as many programs as heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.cache_write.fused import write_kv
from kernels.strides import row_stride


@triton.jit
def load_head(x, weight, o_d, rstd, D: tl.constexpr):
    """Return elements ``o_d`` of a head, normalised if ``weight`` is given, rounded like x."""
    b_x = tl.load(x + o_d, mask=o_d < D, other=0.0)
    if weight is not None:
        b_w = tl.load(weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        b_x = (b_x.to(tl.float32) * rstd * b_w).to(b_x.dtype)
    return b_x


@triton.jit
def rotate_head(x, weight, cos, sin, y, eps, D: tl.constexpr, R: tl.constexpr):
    """Normalise one head and rotate its first R elements. Each of them is paired with its partner
    in the other half of R."""
    o_d = tl.arange(0, triton.next_power_of_2(D))
    rstd = 1.0
    if weight is not None:
        b_x = tl.load(x + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        rstd = tl.math.rsqrt(tl.sum(b_x * b_x, axis=0) / D + eps)
    b_y = load_head(x, weight, o_d, rstd, D)
    if cos is not None:
        o_partner = tl.where(o_d < R // 2, o_d + R // 2, tl.where(o_d < R, o_d - R // 2, o_d))
        b_partner = load_head(x, weight, o_partner, rstd, D).to(tl.float32)
        b_cos = tl.load(cos + o_d, mask=o_d < R, other=1.0).to(tl.float32)
        b_sin = tl.load(sin + o_d, mask=o_d < R, other=0.0).to(tl.float32)
        b_sin = tl.where(o_d < R // 2, -b_sin, b_sin)
        b_y = (b_y.to(tl.float32) * b_cos + b_partner * b_sin).to(b_y.dtype)
    tl.store(y + o_d, b_y, mask=o_d < D)


@triton.jit
def rotate_kernel(
    query,
    key,
    value,
    query_weight,
    key_weight,
    cos,
    sin,
    query_out,
    key_out,
    value_out,
    indices,
    query_stride,
    key_stride,
    value_stride,
    out_stride,
    eps,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
):
    """Program (i_t, i_h): query head i_h, or the next key head, or the next value head."""
    i_t, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if cos is not None:
        cos, sin = cos + i_t * R, sin + i_t * R
    if i_h < HQ:
        p_x, p_y = query + i_t * query_stride + i_h * D, query_out + (i_t * HQ + i_h) * D
        rotate_head(p_x, query_weight, cos, sin, p_y, eps, D, R)
    else:
        i_row = i_t if indices is None else tl.load(indices + i_t).to(tl.int64)
        if i_h < HQ + HKV:
            p_x = key + i_t * key_stride + (i_h - HQ) * D
            p_y = key_out + i_row * out_stride + (i_h - HQ) * D
            rotate_head(p_x, key_weight, cos, sin, p_y, eps, D, R)
        elif value is not None:
            o_d = tl.arange(0, triton.next_power_of_2(D))
            first = (i_h - HQ - HKV) * D
            b_x = tl.load(value + i_t * value_stride + first + o_d, mask=o_d < D)
            tl.store(value_out + i_row * out_stride + first + o_d, b_x, mask=o_d < D)


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the first R of each head's D dimensions; see ``reference.rotate``.

    Query ``[T, HQ, D]`` and key ``[T, HKV, D]`` may be views of wider rows. Computed in float32.
    """
    key_out = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    return _launch(query, key, None, key_out, None, None, None, 0.0, (cos, sin)), key_out


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
    """Normalise and rotate queries and keys, and write keys and values into the pools; see
    ``reference.rotate_and_write``. Inputs may be views of wider rows. One launch."""
    if norms is None and angles is None:
        write_kv(key, value, key_pool, value_pool, indices)
        return query
    return _launch(query, key, value, key_pool, value_pool, indices, norms, eps, angles)


def _launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    key_out: torch.Tensor,
    value_out: torch.Tensor | None,
    indices: torch.Tensor | None,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    num_tokens, num_heads, size = query.shape
    num_keys = key.shape[1]
    query_out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if not num_tokens:
        return query_out
    query, key = _with_adjacent_heads(query), _with_adjacent_heads(key)
    value = None if value is None else _with_adjacent_heads(value)
    outs = [key_out] if value_out is None else [key_out, value_out]
    cos, sin = (None, None) if angles is None else (x.contiguous() for x in angles)
    rotate_kernel[(num_tokens, num_heads + num_keys + (0 if value is None else num_keys))](
        query,
        key,
        value,
        *(norms or (None, None)),
        cos,
        sin,
        query_out,
        key_out,
        value_out,
        indices,
        query.stride(0),
        key.stride(0),
        0 if value is None else value.stride(0),
        row_stride("a KV row", *outs),
        eps,
        HQ=num_heads,
        HKV=num_keys,
        D=size,
        R=0 if cos is None else cos.shape[-1],
        num_warps=1 if size <= 256 else 4,
    )
    return query_out


def _with_adjacent_heads(x: torch.Tensor) -> torch.Tensor:
    """Return ``x [T, H, D]`` with heads next to each other; a view if it has that form."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
