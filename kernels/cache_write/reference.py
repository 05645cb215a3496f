"""Writing KV rows into the pool, and moving them in it, in plain PyTorch."""

from __future__ import annotations

import torch

MOVED_BYTES = 2**18
"""Of rows that are read before they are written: what stays in the processor's cache meanwhile."""


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """``pool[indices[t]] = new[t]`` for both.

    New ``[T, HKV, D]``, pools ``[N, HKV, D]`` of any strides, indices integer ``[T]``, distinct.
    """
    indices = indices.long()
    key_pool.index_copy_(0, indices, key)
    value_pool.index_copy_(0, indices, value)


def move_rows(arena: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """``arena[targets[n]] = arena[sources[n]]`` for every n: rows that make room for a slot.

    - ``arena``: ``[N, E]``, any dtype; a row is all that one token has, in all layers.
    - ``sources``, ``targets``: int32[n]. Targets are distinct and none of them is a source, so
      order does not matter.

    Moves ``2 * n`` rows.
    """
    num_rows = max(MOVED_BYTES // (arena.shape[1] * arena.element_size()), 1)
    parts = sources.split(num_rows), targets.long().split(num_rows)
    for source, target in zip(*parts, strict=True):
        arena.index_copy_(0, target, arena.index_select(0, source))
