"""Writes of KV rows with ``native.cpp``; see ``reference``."""

from __future__ import annotations

import torch

from kernels.cache_write import reference
from kernels.cache_write.reference import gather_rows, move_rows
from kernels.native import function, has_whole_rows, whole_rows

__all__ = ["gather_rows", "move_rows", "write_kv", "write_rows"]


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    """Compute ``reference.write_kv``."""
    pools = key_pool, value_pool
    if (
        key.dtype is not key_pool.dtype
        or key_pool.stride() != value_pool.stride()
        or not all(map(has_whole_rows, pools))
    ):
        return reference.write_kv(key, value, key_pool, value_pool, indices)
    key, value, indices = whole_rows(key), whole_rows(value), indices.long()
    size = key.element_size()
    function("write_kv", "pipippipii")(
        key.data_ptr(), key.stride(0) * size, value.data_ptr(), value.stride(0) * size,
        key_pool.data_ptr(), value_pool.data_ptr(), key_pool.stride(0) * size,
        indices.data_ptr(), len(key), key_pool[0].numel() * size,
    )  # fmt: skip


def write_rows(rows: torch.Tensor, pool: torch.Tensor, indices: torch.Tensor) -> None:
    """Compute ``reference.write_rows``."""
    is_plain = pool.stride(1) == 1 and indices.dtype in (torch.int32, torch.int64)
    if rows.dtype is not pool.dtype or not is_plain or not indices.is_contiguous():
        return reference.write_rows(rows, pool, indices)
    rows, size = whole_rows(rows), rows.element_size()
    function("write_rows", "pipipiii")(
        rows.data_ptr(), rows.stride(0) * size, pool.data_ptr(), pool.stride(0) * size,
        indices.data_ptr(), indices.element_size(), len(rows), pool.shape[1] * size,
    )  # fmt: skip
