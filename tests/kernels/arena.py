"""An arena like the engine's: rows of all attention layers, and slabs of rows for states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from kernels.packed import Exports, Packed


class Sizes(NamedTuple):
    """Sizes of a hybrid model."""

    kv: tuple[int, int, int]
    """L, HKV, D."""
    conv: tuple[int, int, int]
    """L, C, W - 1."""
    recurrent: tuple[int, int, int, int]
    """L, HV, K, V."""


QWEN3_NEXT = Sizes(kv=(12, 2, 256), conv=(36, 8192, 3), recurrent=(36, 32, 128, 128))


class Arena(NamedTuple):
    """Bytes of an arena, and the views that kernels get."""

    rows: torch.Tensor
    """uint8 ``[N, row bytes]``."""
    slabs: torch.Tensor
    """uint8 ``[1, S, slab bytes]``."""
    keys: torch.Tensor
    """``[L, N, HKV, D]``."""
    values: torch.Tensor
    conv: torch.Tensor
    """``[L, S, C, W - 1]``."""
    recurrent: torch.Tensor
    """``[L, S, HV, K, V]``."""

    @property
    def slab_rows(self) -> int:
        return self.rows.shape[0] // self.slabs.shape[1]


def make_arena(
    num_slabs: int,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    device: str = "cpu",
    sizes: Sizes = QWEN3_NEXT,
    fill: int | None = 255,
) -> Arena:
    """Return an arena filled with bytes that are NaN in every dtype.

    With ``fill`` None, its memory is not touched and may exceed that of the machine.
    """
    layers, heads, size = sizes.kv
    row_bytes = 2 * math.prod(sizes.kv) * dtype.itemsize
    conv_bytes = -(-math.prod(sizes.conv) * dtype.itemsize // 16) * 16
    state_bytes = conv_bytes + math.prod(sizes.recurrent) * state_dtype.itemsize
    slab_rows = -(-state_bytes // row_bytes)
    num_rows, slab_bytes = num_slabs * slab_rows, slab_rows * row_bytes
    if fill is None and device == "cpu":
        flat = torch.as_tensor(np.zeros(num_rows * row_bytes, np.uint8), device=device)
    else:
        flat = torch.full((num_rows * row_bytes,), fill or 0, dtype=torch.uint8, device=device)
    row, side = row_bytes // dtype.itemsize, heads * size
    kv_shape, kv_strides = (layers, num_rows, heads, size), (2 * side, row, size, 1)
    return Arena(
        rows=flat.view(num_rows, row_bytes),
        slabs=flat.view(1, num_slabs, slab_bytes),
        keys=flat.view(dtype).as_strided(kv_shape, kv_strides),
        values=flat.view(dtype).as_strided(kv_shape, kv_strides, side),
        conv=_states(flat.view(dtype), num_slabs, slab_bytes, 0, sizes.conv),
        recurrent=_states(
            flat.view(state_dtype), num_slabs, slab_bytes, conv_bytes, sizes.recurrent
        ),
    )


def _states(
    flat: torch.Tensor, num_slabs: int, slab_bytes: int, first_byte: int, shape: Sequence[int]
) -> torch.Tensor:
    """Return a view ``[L, S, ...]`` of each slab from ``first_byte`` on, layer after layer."""
    layers, *state = shape
    inner = [math.prod(state[i + 1 :]) for i in range(len(state))]
    slab, first = slab_bytes // flat.itemsize, first_byte // flat.itemsize
    return flat.as_strided((layers, num_slabs, *state), (math.prod(state), slab, *inner), first)


def prompts(tile_size: int = 64) -> dict[str, Any]:
    """Return the arguments of a launch for two new prompts of 96 and 64 tokens, with an export."""
    packed = Packed.from_lengths([96, 64], tile_size=tile_size)
    return {
        "packed": packed,
        "slots": torch.arange(2, dtype=torch.int32),
        "resumed": torch.zeros(2, dtype=torch.bool),
        "exports": Exports.plan(packed, [(0, 64, 2)]),
    }


def verified() -> dict[str, Any]:
    """Return the arguments of a launch that verifies 3 tokens and 1 token, with 6 states."""
    return {
        "packed": Packed.from_lengths([3, 1]),
        "slots": torch.arange(2, dtype=torch.int32),
        "step_slots": torch.arange(2, 6, dtype=torch.int32),
    }
