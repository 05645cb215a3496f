"""Copies of states between slots, and to checkpoints in fewer bits and back, in plain PyTorch: the
definition, and the CPU path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from kernels.state_copy.narrow import narrow, widen


class StateLayout(NamedTuple):
    """Layout of a pool's states in the bytes of a checkpoint, layer after layer."""

    dtype: torch.dtype
    dims: tuple[int, ...] | None
    """Dimensions of states ``[N, L, ...]`` along which scales differ, including 0 and 1. None if
    nothing is scaled."""
    first: int
    """First byte of the codes."""
    first_scale: int
    """First byte of the float32 scales."""


def copy_states(
    pools: Sequence[torch.Tensor], sources: torch.Tensor, targets: torch.Tensor
) -> None:
    """Copy states between slots: ``pool[:, targets[n]] = pool[:, sources[n]]`` in every pool.

    - ``pools``: each ``[L, S, ...]``, of any dtype and strides. Whole slabs of an arena are one
      pool ``[1, S, bytes]``.
    - ``sources``, ``targets``: int32[N]. Targets are distinct and none of them is a source, so the
      order does not matter.

    Moves ``2 * N`` states of each pool.
    """
    for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
        for pool in pools:
            pool[:, target].copy_(pool[:, source])


def narrow_states(
    pool: torch.Tensor,
    sources: torch.Tensor,
    slots: torch.Tensor,
    targets: torch.Tensor,
    form: StateLayout,
) -> None:
    """Write the states ``pool[:, sources[n]]`` into the checkpoints ``slots[targets[n]]``.

    - ``pool``: ``[L, S, ...]``, float32 or bfloat16, any strides.
    - ``slots``: uint8 ``[C, bytes]``, rows of any stride.
    - ``sources``, ``targets``: int64[N]; targets are distinct.

    Codes and scales are those of `narrow`. Reads N states.
    """
    taken, scales = pool[:, sources].transpose(0, 1), None
    if form.dims is None:
        codes = taken.to(form.dtype)
    else:
        codes, scales = narrow(taken, form.dtype, form.dims)
    for first, numbers in ((form.first, codes), (form.first_scale, scales)):
        if numbers is not None:
            written = numbers.contiguous().view(len(targets), -1).view(torch.uint8)
            slots[targets, first : first + written.shape[1]] = written


def widen_states(
    slots: torch.Tensor,
    sources: torch.Tensor,
    pool: torch.Tensor,
    targets: torch.Tensor,
    form: StateLayout,
) -> None:
    """Read ``pool[:, targets[n]]`` from the checkpoints ``slots[sources[n]]``.

    Arguments are as in `narrow_states`.
    """
    taken = slots[sources]
    shape = (len(sources), len(pool), *pool.shape[2:])
    found = _read(taken, form.first, form.dtype, shape)
    if form.dims is not None:
        kept = tuple(n if dim in form.dims else 1 for dim, n in enumerate(shape))
        found = widen(found, _read(taken, form.first_scale, torch.float32, kept))
    pool[:, targets] = found.transpose(0, 1).to(pool.dtype)


def _read(
    taken: torch.Tensor, first: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    num_bytes = math.prod(shape[1:]) * dtype.itemsize
    return taken[:, first : first + num_bytes].contiguous().view(dtype).view(shape)
