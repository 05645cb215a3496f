"""Attention with its decoding step by ``native.cpp``, which reads KV rows where they lie; see
``reference``."""

from __future__ import annotations

import torch

from kernels.attention import reference
from kernels.attention.reference import prefill_attention
from kernels.attention.sequences import Sequences
from kernels.native import DTYPES, LANES, function, has_whole_rows, whole_rows
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
    """As ``reference.decode_attention``."""
    num_sequences, num_heads, head_dim = query.shape
    num_kv_heads = key_pool.shape[1]
    if (
        query.dtype not in DTYPES
        or query.dtype is not key_pool.dtype
        or head_dim % LANES
        or head_dim > MAX_HEAD
        or key_pool.stride() != value_pool.stride()
        or key_pool.shape != value_pool.shape
        or not has_whole_rows(key_pool)
    ):
        return reference.decode_attention(
            query, key_pool, value_pool, table=table, sequences=sequences, scale=scale
        )
    query = whole_rows(query)
    out = torch.empty(query.shape, dtype=query.dtype)
    function(f"decode_attention_{DTYPES[query.dtype]}", "pippipipppiiiift")(
        query.data_ptr(), query.stride(0), key_pool.data_ptr(), value_pool.data_ptr(),
        key_pool.stride(0), table.data_ptr(), table.stride(0), sequences.row_table.data_ptr(),
        sequences.kv_len_table.data_ptr(), out.data_ptr(), num_sequences, num_kv_heads,
        num_heads // num_kv_heads, head_dim, scale, torch.get_num_threads(),
    )  # fmt: skip
    return out


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
    """As ``reference.verify_attention``: every token is a sequence that ends with it."""
    rows, ends = [], []
    for row, kv_len, length in zip(sequences.rows, sequences.kv_lens, packed.lengths, strict=True):
        rows += [row] * length
        ends += range(kv_len - length + 1, kv_len + 1)
    each = Sequences.of(rows, ends, query.device)
    return decode_attention(query, key_pool, value_pool, table=table, sequences=each, scale=scale)
