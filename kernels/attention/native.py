"""Attention with native decoding and verification (``native.cpp``), reading KV rows in place; see
``reference``."""

from __future__ import annotations

import torch

from kernels.attention import reference
from kernels.attention.reference import prefill_attention
from kernels.attention.sequences import Sequences
from kernels.native import DTYPES, address, function, has_whole_rows, whole_rows
from kernels.packed import Packed

__all__ = ["decode_attention", "prefill_attention", "verify_attention"]

MAX_HEAD = 512


def decode_attention(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    *,
    table: torch.Tensor,
    sequences: Sequences,
    scale: float,
) -> torch.Tensor:
    """Compute ``reference.decode_attention``."""
    if not _is_served(query, key_pool, value_pool):
        return reference.decode_attention(
            query, key_pool, value_pool, table=table, sequences=sequences, scale=scale
        )
    return _decode(query, key_pool, value_pool, table, sequences, None, scale)


def verify_attention(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    *,
    table: torch.Tensor,
    sequences: Sequences,
    packed: Packed,
    scale: float,
) -> torch.Tensor:
    """Compute ``reference.verify_attention`` with the bits of `decode_attention`.

    Lengths are those of ``packed.cu_seqlens``.
    """
    if not _is_served(query, key_pool, value_pool):
        return reference.verify_attention(
            query,
            key_pool,
            value_pool,
            table=table,
            sequences=sequences,
            packed=packed,
            scale=scale,
        )
    return _decode(query, key_pool, value_pool, table, sequences, packed.cu_seqlens, scale)


def _is_served(query: torch.Tensor, key_pool: torch.Tensor, value_pool: torch.Tensor) -> bool:
    head_dim = query.shape[-1]
    return (
        query.dtype in DTYPES
        and query.dtype is key_pool.dtype
        and head_dim <= MAX_HEAD
        and key_pool.stride() == value_pool.stride()
        and key_pool.shape == value_pool.shape
        and has_whole_rows(key_pool)
    )


def _decode(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    table: torch.Tensor,
    sequences: Sequences,
    cu_seqlens: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = key_pool.shape[1]
    query = whole_rows(query)
    out = torch.empty(query.shape, dtype=query.dtype)
    function(f"decode_attention_{DTYPES[query.dtype]}", "pippipippppiiiift")(
        query.data_ptr(), query.stride(0), key_pool.data_ptr(), value_pool.data_ptr(),
        key_pool.stride(0), table.data_ptr(), table.stride(0), sequences.row_table.data_ptr(),
        sequences.kv_len_table.data_ptr(), address(cu_seqlens), out.data_ptr(),
        len(sequences.row_table), num_kv_heads, num_heads // num_kv_heads, head_dim, scale,
        torch.get_num_threads(),
    )  # fmt: skip
    return out
