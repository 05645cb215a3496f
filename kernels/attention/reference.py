"""Causal grouped-query attention over a KV pool, in plain PyTorch.

    out[t, h] = sum_j softmax_j(scale * q[t, h] . k[j, h // G]) v[j, h // G]      j <= position of t

A sequence's keys are the pool rows listed in its row of the request table, in order. Prefill is
divided on an absolute grid. Queries form blocks of 256 positions, each with the keys up to the end
of its block, however many positions of the block are computed now. Products have whole tiles of 64
positions, with zeros before the first query of a tile. A prefill resumed at any position therefore
computes products of the same shapes as one from zero. ``torch.equal`` holds between them, measured
with float32 and bfloat16, one and two threads, and head sizes 40 to 256.
"""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F

from kernels.activation.reference import sigmoid_mul
from kernels.attention.sequences import KVInputs, PackedKVInputs

TILE = 64
"""Positions per tile of queries."""
BLOCK = 256
"""Positions per block of queries, and the unit of key ranges."""


def prefill_attention(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    *,
    gate: torch.Tensor | None = None,
    **where: Unpack[PackedKVInputs],
) -> torch.Tensor:
    """Compute attention of new tokens to themselves and to all earlier tokens.

    The KV of the new tokens must be in the pool.

    Args:
        query: ``[T, HQ, D]``, the packed new tokens.
        key_pool, value_pool: ``[N, HKV, D]``; HQ is a multiple of HKV.
        gate: ``[T, HQ * D]``, of which the output is multiplied by the sigmoid, or None.
        where: see `kernels.attention.sequences.PackedKVInputs`.

    Returns:
        ``[T, HQ, D]`` in the query's dtype. O(T * length * HQ * D).
    """
    out, sequences, lengths = torch.empty_like(query), where["sequences"], where["packed"].lengths
    offset = 0
    for row, kv_len, length in zip(sequences.rows, sequences.kv_lens, lengths, strict=True):
        if length:
            indices = where["table"][row, :kv_len]
            keys = _padded_rows(key_pool, indices)
            values = keys if value_pool is key_pool else _padded_rows(value_pool, indices)
            span = slice(offset, offset + length)
            _prefill_one(query[span], keys, values, kv_len - length, where["scale"], out[span])
            offset += length
    return gated(out, gate)


def decode_attention(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    *,
    gate: torch.Tensor | None = None,
    **where: Unpack[KVInputs],
) -> torch.Tensor:
    """Compute attention of the last token of each sequence, ``query [B, HQ, D]``.

    Every sequence is computed separately, from an aligned copy of its query, so results do not
    depend on the batch. Returns ``[B, HQ, D]``.
    """
    out, sequences, scale = torch.empty_like(query), where["sequences"], where["scale"]
    num_kv_heads = key_pool.shape[1]
    for b, (row, kv_len) in enumerate(zip(sequences.rows, sequences.kv_lens, strict=True)):
        indices = where["table"][row, :kv_len]
        keys = _rows(key_pool, indices).transpose(0, 1)[None]
        values = keys
        if value_pool is not key_pool:
            values = _rows(value_pool, indices).transpose(0, 1)[None]
        grouped = query[b].clone().view(1, num_kv_heads, -1, query.shape[-1])
        out[b] = F.scaled_dot_product_attention(grouped, keys, values, scale=scale).view_as(out[b])
    return gated(out, gate)


def verify_attention(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    *,
    gate: torch.Tensor | None = None,
    **where: Unpack[PackedKVInputs],
) -> torch.Tensor:
    """Compute causal attention of the last tokens of each sequence, packed ``query [T, HQ, D]``.

    These are the last ``packed.lengths[b]`` of ``sequences.kv_lens[b]`` tokens. Bits are equal to
    those of `decode_attention`, called once per token: every product has the shape of its position.
    Returns ``[T, HQ, D]``.
    """
    out, sequences, lengths = torch.empty_like(query), where["sequences"], where["packed"].lengths
    num_kv_heads, t = key_pool.shape[1], 0
    for row, kv_len, length in zip(sequences.rows, sequences.kv_lens, lengths, strict=True):
        indices = where["table"][row, :kv_len]
        keys, values = (
            _rows(pool, indices).transpose(0, 1)[None] for pool in (key_pool, value_pool)
        )
        for end in range(kv_len - length + 1, kv_len + 1):
            grouped = query[t].clone().view(1, num_kv_heads, -1, query.shape[-1])
            attended = F.scaled_dot_product_attention(
                grouped, keys[:, :, :end], values[:, :, :end], scale=where["scale"]
            )
            out[t] = attended.view_as(out[t])
            t += 1
    return gated(out, gate)


def gated(out: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """Return ``out [T, HQ, D]`` times the sigmoid of ``gate [T, HQ * D]``, or ``out``."""
    return out if gate is None else sigmoid_mul(out.flatten(1), gate).view_as(out)


def _prefill_one(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Compute one sequence, block by block.

    query and out: ``[T, HQ, D]``; keys and values: ``[HKV, L, D]``, L a multiple of 256.
    """
    end = start + len(query)
    while start < end:
        key_end = (start // BLOCK + 1) * BLOCK
        num_queries = min(key_end, end) - start
        block, query = query[:num_queries], query[num_queries:]
        lead = start % TILE
        num_padded = -(-(lead + num_queries) // TILE) * TILE
        behind = num_padded - lead - num_queries
        block = F.pad(block, (0, 0, 0, 0, lead, behind)).transpose(0, 1)
        # 0 up to each query's position, -inf after it.
        mask = query.new_zeros(num_padded, key_end)
        mask[:, key_end - BLOCK :].fill_(-torch.inf).triu_((start - lead) % BLOCK + 1)
        attended = F.scaled_dot_product_attention(
            block[None],
            keys[None, :, :key_end],
            values[None, :, :key_end],
            attn_mask=mask,
            scale=scale,
            enable_gqa=True,
        )[0]
        out[:num_queries] = attended[:, lead : lead + num_queries].transpose(0, 1)
        out = out[num_queries:]
        start += num_queries


def _padded_rows(pool: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the pool's rows at ``indices``, zero-padded to a multiple of 256: ``[HKV, L, D]``."""
    num_padded = -(-len(indices) // BLOCK) * BLOCK
    rows = pool.new_empty(num_padded, *pool.shape[1:])
    torch.index_select(pool, 0, indices, out=rows[: len(indices)])
    rows[len(indices) :] = 0
    return rows.transpose(0, 1)


def _rows(pool: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the pool's rows at ``indices``: a view if they are one dense range, else a copy.

    Rows of an arena are not dense, and reading them in place takes a third longer.
    """
    if not pool.is_contiguous():
        return pool.index_select(0, indices)
    first, last = int(indices[0]), int(indices[-1])
    if last - first == len(indices) - 1 and bool((indices.diff() == 1).all()):
        return pool[first : last + 1]
    return pool.index_select(0, indices)
