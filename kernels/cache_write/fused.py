"""Writing new keys and values into the KV pool in Triton: both in one launch, a token per program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def write_kv_kernel(
    key,
    value,
    key_pool,
    value_pool,
    indices,
    key_stride_t,
    key_stride_h,
    value_stride_t,
    value_stride_h,
    pool_stride,
    D: tl.constexpr,
    N: tl.constexpr,
    BN: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BN)
    mask = o_n < N
    o_h, o_d = o_n // D, o_n % D
    p_pool = tl.load(indices + i_t).to(tl.int64) * pool_stride + o_n
    b_key = tl.load(key + i_t * key_stride_t + o_h * key_stride_h + o_d, mask=mask)  # [BN]
    tl.store(key_pool + p_pool, b_key, mask=mask)
    b_value = tl.load(value + i_t * value_stride_t + o_h * value_stride_h + o_d, mask=mask)
    tl.store(value_pool + p_pool, b_value, mask=mask)


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """``pool[indices[t]] = new[t]`` for both; see ``reference.write_kv``.

    New ``[T, HKV, D]`` may be strided views with a unit last stride; each pool row ``[HKV, D]`` is contiguous.
    """
    tokens, heads, size = key.shape
    if tokens == 0:
        return
    write_kv_kernel[(tokens,)](
        key,
        value,
        key_pool,
        value_pool,
        indices,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        key_pool.stride(0),
        D=size,
        N=heads * size,
        BN=triton.next_power_of_2(heads * size),
    )
