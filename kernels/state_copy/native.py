"""Copying states between slots by ``native.cpp``; see ``reference``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.native import function, has_whole_rows
from kernels.state_copy import reference

__all__ = ["copy_states"]


def copy_states(
    pools: Sequence[torch.Tensor], sources: torch.Tensor, targets: torch.Tensor
) -> None:
    """As ``reference.copy_states``: one call for each pool."""
    if not all(has_whole_rows(pool[0]) for pool in pools):
        return reference.copy_states(pools, sources, targets)
    for pool in pools:
        size = pool.element_size()
        function("copy_states", "piiiippit")(
            pool.data_ptr(), len(pool), pool.stride(0) * size, pool.stride(1) * size,
            pool[0, 0].numel() * size, sources.data_ptr(), targets.data_ptr(), len(sources),
            torch.get_num_threads(),
        )  # fmt: skip
