"""Copying states between slots, in plain PyTorch: the definition, and the CPU path."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def copy_states(
    pools: Sequence[torch.Tensor], sources: torch.Tensor, targets: torch.Tensor
) -> None:
    """``pool[:, targets[n]] = pool[:, sources[n]]`` in every pool, for every n: copy-on-write,
    donate and restore.

    - ``pools``: each ``[L, S, ...]``, any dtype and strides. Whole slabs of an arena are one pool
      ``[1, S, bytes]``.
    - ``sources``, ``targets``: int32[N]. Targets are distinct and none of them is a source, so
      order does not matter.

    Moves ``2 * N`` states of each pool.
    """
    for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
        for pool in pools:
            pool[:, target].copy_(pool[:, source])
