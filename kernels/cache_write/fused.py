"""Writes of KV rows to the pool, and moves within it, in Triton. One launch, one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.state_copy.fused import BLOCK_BYTES, copy_block
from kernels.strides import row_stride


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


@triton.jit
def write_rows_kernel(
    rows, pool, indices, row_stride, pool_stride, D: tl.constexpr, BD: tl.constexpr
):
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    b_row = tl.load(rows + i_t * row_stride + o_d, mask=o_d < D)
    p_pool = pool + tl.load(indices + i_t).to(tl.int64) * pool_stride
    tl.store(p_pool + o_d, b_row, mask=o_d < D)


@triton.jit(do_not_specialize_on_alignment=["p_sources", "p_targets"])
def move_rows_kernel(p_arena, p_sources, p_targets, width, stride_row, BLOCK_BYTES: tl.constexpr):
    """Program (i_row, i_block): moves one block of one row."""
    i_source = tl.load(p_sources + tl.program_id(0)).to(tl.int64)
    i_target = tl.load(p_targets + tl.program_id(0)).to(tl.int64)
    p_source, p_target = p_arena + i_source * stride_row, p_arena + i_target * stride_row
    copy_block(p_source, p_target, width, tl.program_id(1), BLOCK_BYTES)


@triton.jit(do_not_specialize_on_alignment=["p_indices"])
def gather_rows_kernel(
    p_rows, p_indices, p_out, width, stride_row, stride_out, BLOCK_BYTES: tl.constexpr
):
    """Program (i_row, i_block): copies one block of one row."""
    i_row = tl.program_id(0).to(tl.int64)
    p_source = p_rows + tl.load(p_indices + i_row).to(tl.int64) * stride_row
    copy_block(p_source, p_out + i_row * stride_out, width, tl.program_id(1), BLOCK_BYTES)


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """Write ``pool[indices[t]] = new[t]`` for keys and values; see ``reference.write_kv``.

    New rows ``[T, HKV, D]`` may be strided views with a unit last stride. A row ``[HKV, D]`` of a
    pool is contiguous, with any stride between rows. Both pools have equal strides.
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
        row_stride("a KV row", key_pool, value_pool),
        D=size,
        N=heads * size,
        BN=triton.next_power_of_2(heads * size),
    )


def write_rows(rows: torch.Tensor, pool: torch.Tensor, indices: torch.Tensor) -> None:
    """Write ``pool[indices[t]] = rows[t]``; see ``reference.write_rows``.

    Rows ``[T, D]`` may be strided views with a unit last stride. A row of the pool is contiguous,
    with any stride between rows. One launch.
    """
    tokens, size = rows.shape
    stride = row_stride("a row", pool)
    if tokens:
        write_rows_kernel[(tokens,)](
            rows, pool, indices, rows.stride(0), stride, D=size, BD=triton.next_power_of_2(size)
        )


def move_rows(arena: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """Move ``arena[targets[n]] = arena[sources[n]]`` for every n; see ``reference.move_rows``.

    A row of ``arena`` ``[N, E]`` is contiguous, with any stride between rows. One launch, bound by
    memory bandwidth.
    """
    stride, width = row_stride("a row", arena), arena.shape[1]
    num_bytes = width * arena.element_size()
    block = min(BLOCK_BYTES, triton.next_power_of_2(num_bytes))
    if len(sources):
        move_rows_kernel[(len(sources), triton.cdiv(num_bytes, block))](
            arena, sources, targets, width, stride, BLOCK_BYTES=block, num_warps=4
        )


def gather_rows(rows: torch.Tensor, indices: torch.Tensor, out: torch.Tensor) -> None:
    """Copy ``out[n] = rows[indices[n]]``; see ``reference.gather_rows``.

    ``rows`` may be page-locked memory of the host, which the device reads over its bus. One launch.
    """
    num_bytes = rows.shape[1] * rows.element_size()
    block = min(BLOCK_BYTES, triton.next_power_of_2(num_bytes))
    if len(indices):
        gather_rows_kernel[(len(indices), triton.cdiv(num_bytes, block))](
            rows,
            indices,
            out,
            rows.shape[1],
            row_stride("a row", rows),
            row_stride("a row", out),
            BLOCK_BYTES=block,
            num_warps=4,
        )
