"""Attention in C++, reading KV rows in place; see ``reference``."""

from __future__ import annotations

from typing import Unpack

import torch

from kernels.activation.native import sigmoid_mul
from kernels.attention import reference
from kernels.attention.sequences import KVInputs, PackedKVInputs
from kernels.native import DTYPES, address, function, has_whole_rows, prompts_function, whole_rows
from kernels.packed import Packed

__all__ = ["decode_attention", "prefill_attention", "verify_attention"]

MAX_HEAD = 512
"""Maximum head size of decoding."""


def prefill_attention(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    *,
    gate: torch.Tensor | None = None,
    **where: Unpack[PackedKVInputs],
) -> torch.Tensor:
    """Compute ``reference.prefill_attention``. Threads share the work by queries and heads."""
    out = prefill(query, key_pool, value_pool, query.shape[-1], **where)
    if out is None:
        out = reference.prefill_attention(query, key_pool, value_pool, **where)
    return gated(out, gate)


def prefill(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    value_dim: int,
    **where: Unpack[PackedKVInputs],
) -> torch.Tensor | None:
    """Compute attention of prompts with the first ``value_dim`` numbers of values: ``[T, HQ,
    value_dim]``. None if the library cannot."""
    kernel = prompts_function("prefill_attention", query.dtype, "pippipippppiiiiift")
    if kernel is None or not _is_served(query, key_pool, value_pool):
        return None
    query = whole_rows(query)
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = key_pool.shape[1]
    table, sequences = where["table"], where["sequences"]
    out = torch.empty(len(query), num_heads, value_dim, dtype=query.dtype)
    kernel(
        query.data_ptr(), query.stride(0), key_pool.data_ptr(), value_pool.data_ptr(),
        key_pool.stride(0), table.data_ptr(), table.stride(0), sequences.row_table.data_ptr(),
        sequences.kv_len_table.data_ptr(), where["packed"].cu_seqlens.data_ptr(), out.data_ptr(),
        len(sequences.row_table), num_kv_heads, num_heads // num_kv_heads, head_dim, value_dim,
        where["scale"], torch.get_num_threads(),
    )  # fmt: skip
    return out


def decode_attention(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    *,
    gate: torch.Tensor | None = None,
    **where: Unpack[KVInputs],
) -> torch.Tensor:
    """Compute ``reference.decode_attention``."""
    out = _decode(query, key_pool, value_pool, None, **where)
    if out is None:
        out = reference.decode_attention(query, key_pool, value_pool, **where)
    return gated(out, gate)


def verify_attention(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    *,
    gate: torch.Tensor | None = None,
    **where: Unpack[PackedKVInputs],
) -> torch.Tensor:
    """Compute ``reference.verify_attention`` with the bits of `decode_attention`.

    Lengths are those of ``packed.cu_seqlens``.
    """
    out = _decode(query, key_pool, value_pool, **where)
    if out is None:
        out = reference.verify_attention(query, key_pool, value_pool, **where)
    return gated(out, gate)


def gated(out: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """Compute ``reference.gated``."""
    return out if gate is None else sigmoid_mul(out.flatten(1), gate).view_as(out)


def _is_served(query: torch.Tensor, key_pool: torch.Tensor, value_pool: torch.Tensor) -> bool:
    return (
        query.dtype in DTYPES
        and query.dtype is key_pool.dtype
        and key_pool.stride() == value_pool.stride()
        and key_pool.shape == value_pool.shape
        and has_whole_rows(key_pool)
    )


def _decode(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    packed: Packed | None,
    **where: Unpack[KVInputs],
) -> torch.Tensor | None:
    """Compute attention of one token per sequence, or of those in ``packed``. None if the library
    cannot."""
    if query.shape[-1] > MAX_HEAD or not _is_served(query, key_pool, value_pool):
        return None
    table, sequences = where["table"], where["sequences"]
    cu_seqlens = None if packed is None else packed.cu_seqlens
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = key_pool.shape[1]
    query = whole_rows(query)
    out = torch.empty(query.shape, dtype=query.dtype)
    function(f"decode_attention_{DTYPES[query.dtype]}", "pippipippppiiiift")(
        query.data_ptr(), query.stride(0), key_pool.data_ptr(), value_pool.data_ptr(),
        key_pool.stride(0), table.data_ptr(), table.stride(0), sequences.row_table.data_ptr(),
        sequences.kv_len_table.data_ptr(), address(cu_seqlens), out.data_ptr(),
        len(sequences.row_table), num_kv_heads, num_heads // num_kv_heads, head_dim,
        where["scale"], torch.get_num_threads(),
    )  # fmt: skip
    return out
