"""Writes of KV rows to the pool, and moves within it, in plain PyTorch."""

from __future__ import annotations

import math

import torch

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""Dtypes by size. torch writes indexed rows element by element, so wide elements are faster."""
MOVED_BYTES = 2**18
"""Bytes of rows that are read before they are written, so that they fit into the cache."""


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """Write ``pool[indices[t]] = new[t]`` for keys and values.

    New rows ``[T, HKV, D]``; pools ``[N, HKV, D]`` of any strides; indices integer ``[T]``,
    distinct.
    """
    indices = indices.long()
    key_pool.index_copy_(0, indices, key)
    value_pool.index_copy_(0, indices, value)


def write_rows(rows: torch.Tensor, pool: torch.Tensor, indices: torch.Tensor) -> None:
    """Write ``pool[indices[t]] = rows[t]``, for models with one vector per token.

    Rows ``[T, D]``; pool ``[N, D]`` of any strides; indices integer ``[T]``, distinct.
    """
    pool.index_copy_(0, indices.long(), rows)


def move_rows(arena: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """Move ``arena[targets[n]] = arena[sources[n]]`` for every n, to make room for a slot.

    - ``arena``: ``[N, E]``, any dtype. A row has one token's data of all layers. It is contiguous,
      and aligned to the largest power of 2, up to 16, that divides its size in bytes.
    - ``sources``, ``targets``: int32[n]. Targets are distinct and none of them is a source, so the
      order does not matter.

    Moves ``2 * n`` rows.
    """
    row_bytes = arena.shape[1] * arena.element_size()
    words = arena.view(WORDS[math.gcd(row_bytes, 16)])
    num_rows = max(MOVED_BYTES // row_bytes, 1)
    parts = sources.split(num_rows), targets.long().split(num_rows)
    for source, target in zip(*parts, strict=True):
        words.index_copy_(0, target, words.index_select(0, source))


def gather_rows(rows: torch.Tensor, indices: torch.Tensor, out: torch.Tensor) -> None:
    """Copy ``out[n] = rows[indices[n]]`` for every n.

    ``rows``: ``[N, E]``; ``indices``: int32[n]; ``out``: ``[n, E]``, of the same dtype. A row of
    both is contiguous.
    """
    out.copy_(rows[indices.long()])
