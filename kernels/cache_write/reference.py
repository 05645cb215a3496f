"""Writing new keys and values into the KV pool, in plain PyTorch."""

from __future__ import annotations

import torch


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """``pool[indices[t]] = new[t]`` for both: new ``[T, HKV, D]``, pools ``[N, HKV, D]``, indices integer ``[T]``, distinct."""
    indices = indices.long()
    key_pool.index_copy_(0, indices, key)
    value_pool.index_copy_(0, indices, value)
