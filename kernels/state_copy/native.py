"""Copies of states between slots, and to checkpoints and back, with ``native.cpp``; see
``reference``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from kernels.native import DTYPES, function, has_whole_rows
from kernels.state_copy import reference
from kernels.state_copy.reference import StateLayout

__all__ = ["copy_states", "narrow_states", "widen_states"]

CODES = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
PLACES = "piiipippiii"
"""Argument kinds of the result of `_places`."""


def copy_states(
    pools: Sequence[torch.Tensor], sources: torch.Tensor, targets: torch.Tensor
) -> None:
    """Compute ``reference.copy_states``, with one call per pool."""
    if not all(has_whole_rows(pool[0]) for pool in pools):
        return reference.copy_states(pools, sources, targets)
    for pool in pools:
        size = pool.element_size()
        function("copy_states", "piiiippit")(
            pool.data_ptr(), len(pool), pool.stride(0) * size, pool.stride(1) * size,
            pool[0, 0].numel() * size, sources.data_ptr(), targets.data_ptr(), len(sources),
            torch.get_num_threads(),
        )  # fmt: skip


def narrow_states(
    pool: torch.Tensor,
    sources: torch.Tensor,
    slots: torch.Tensor,
    targets: torch.Tensor,
    form: StateLayout,
) -> None:
    """Compute ``reference.narrow_states``, with the same bits for finite states.

    Unscaled numbers of another dtype use the reference.
    """
    if not _move("pack", "narrow", pool, sources, slots, targets, form):
        reference.narrow_states(pool, sources, slots, targets, form)


def widen_states(
    slots: torch.Tensor,
    sources: torch.Tensor,
    pool: torch.Tensor,
    targets: torch.Tensor,
    form: StateLayout,
) -> None:
    """Compute ``reference.widen_states``, if `narrow_states` is native too."""
    if not _move("unpack", "widen", pool, targets, slots, sources, form):
        reference.widen_states(slots, sources, pool, targets, form)


def _move(
    plain: str,
    coded: str,
    pool: torch.Tensor,
    own: torch.Tensor,
    slots: torch.Tensor,
    kept: torch.Tensor,
    form: StateLayout,
) -> bool:
    """Move states between a pool's slots ``own`` and checkpoints. False if not supported."""
    shape, size = pool.shape[2:], pool.element_size()
    places = own.dtype is kept.dtype is torch.int64 and own.is_contiguous() and kept.is_contiguous()
    if not places or not has_whole_rows(pool[0]) or slots.stride(1) != 1:
        return False
    given = (
        pool.data_ptr(), len(pool), pool.stride(0) * size, pool.stride(1) * size,
        slots.data_ptr(), slots.stride(0), own.data_ptr(), kept.data_ptr(), len(own),
        form.first, form.first_scale,
    )  # fmt: skip
    threads = torch.get_num_threads()
    if form.dims is None:
        if form.dtype is not pool.dtype:
            return False
        function(f"{plain}_states", f"{PLACES}it")(*given, math.prod(shape) * size, threads)
        return True
    if pool.dtype not in DTYPES or form.dtype not in CODES:
        return False
    formats = f"{DTYPES[pool.dtype]}_{CODES[form.dtype]}"
    if form.dims == tuple(range(len(form.dims))):
        num_runs = math.prod(shape[: len(form.dims) - 2])
        run = math.prod(shape) // num_runs
        function(f"{coded}_states_{formats}", f"{PLACES}iit")(*given, num_runs, run, threads)
        return True
    last = pool.dim() - 1
    if form.dims != (*range(last - 1), last):
        return False
    sizes = math.prod(shape[:-2]), *shape[-2:]
    function(f"{coded}_columns_{formats}", f"{PLACES}iiit")(*given, *sizes, threads)
    return True
