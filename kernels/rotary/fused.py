"""Rotary position embedding in Triton: queries and keys of a token in one program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def rotate_heads(
    x,
    y,
    b_cos,
    b_sin,
    stride_h,
    H: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
):
    """Rotate one token's H heads. Each of the first R elements is paired with its partner in the
    other half of R."""
    BH: tl.constexpr = triton.next_power_of_2(H)
    o_h, o_d = tl.arange(0, BH), tl.arange(0, BD)
    o_partner = tl.where(o_d < R // 2, o_d + R // 2, tl.where(o_d < R, o_d - R // 2, o_d))
    mask = (o_h < H)[:, None] & (o_d < D)[None, :]
    b_x = tl.load(x + o_h[:, None] * stride_h + o_d[None, :], mask=mask, other=0.0)
    b_partner = tl.load(x + o_h[:, None] * stride_h + o_partner[None, :], mask=mask, other=0.0)
    b_y = b_x.to(tl.float32) * b_cos[None, :] + b_partner.to(tl.float32) * b_sin[None, :]
    tl.store(y + o_h[:, None] * D + o_d[None, :], b_y.to(y.dtype.element_ty), mask=mask)


@triton.jit
def rotate_kernel(
    query,
    key,
    cos,
    sin,
    query_out,
    key_out,
    query_stride_t,
    query_stride_h,
    key_stride_t,
    key_stride_h,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    b_cos = tl.load(cos + i_t * R + o_d, mask=o_d < R, other=1.0).to(tl.float32)  # [BD]
    b_sin = tl.load(sin + i_t * R + o_d, mask=o_d < R, other=0.0).to(tl.float32)
    b_sin = tl.where(o_d < R // 2, -b_sin, b_sin)
    rotate_heads(
        query + i_t * query_stride_t,
        query_out + i_t * HQ * D,
        b_cos,
        b_sin,
        query_stride_h,
        HQ,
        D,
        R,
        BD,
    )
    rotate_heads(
        key + i_t * key_stride_t, key_out + i_t * HKV * D, b_cos, b_sin, key_stride_h, HKV, D, R, BD
    )


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the first R of each head's D dimensions; see ``reference.rotate``.

    Query ``[T, HQ, D]`` and key ``[T, HKV, D]`` may be strided views with a unit last stride.
    Computed in float32.
    """
    tokens, num_heads, size = query.shape
    query_out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    key_out = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    if tokens:
        rotate_kernel[(tokens,)](
            query,
            key,
            cos.contiguous(),
            sin.contiguous(),
            query_out,
            key_out,
            query.stride(0),
            query.stride(1),
            key.stride(0),
            key.stride(1),
            HQ=num_heads,
            HKV=key.shape[1],
            D=size,
            R=cos.shape[-1],
            BD=triton.next_power_of_2(size),
        )
    return query_out, key_out
