"""Copies of whole states, all layers of Qwen3-Next.

36 layers of 32 x 128 x 128 float32 and 8,192 x 3 bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from experiments.gpu.kernel_cases import Case, Setup
from kernels.state_copy import fused, reference
from kernels.state_copy.fused import BLOCK_BYTES


def cases(setup: Setup) -> Iterator[Case]:
    """Yield copies of 1 to 16 slots. The loop copies slot by slot, torch gathers and scatters."""
    num_layers, heads, key_dim, channels = (2, 2, 16, 48) if setup.is_dry else (36, 32, 128, 8192)
    for num_copies in (1, 4, 16):
        shape = (num_layers, 2 * num_copies)
        pools = [
            setup.randn(*shape, heads, key_dim, key_dim, dtype=torch.float32),
            setup.randn(*shape, channels, 3),
        ]
        order = torch.randperm(num_copies).tolist()
        blocks = -(-max(pool[0, 0].nbytes for pool in pools) // BLOCK_BYTES)
        slots = setup.int32(order), setup.int32(range(num_copies, 2 * num_copies))
        yield Case(
            name=f"state_copy {num_copies} slots",
            run=partial(_copied, fused.copy_states, pools, *slots),
            expected=partial(torch.clone, pools[0][:, order]),
            num_bytes=2 * num_copies * sum(pool[:, 0].nbytes for pool in pools),
            rivals={
                "loop": partial(_copied, reference.copy_states, pools, *slots),
                "torch": partial(_copied, _indexed, pools, *slots),
                "torch index_copy": partial(_copied, _index_copy, pools, *slots),
            },
            tolerance=0.0,
            moved_bytes=2 * num_copies * sum(pool[:, 0].nbytes for pool in pools)
            + blocks * num_layers * num_copies * 8,
        )


def _copied(copy, pools, sources, targets) -> torch.Tensor:
    copy(pools, sources, targets)
    return pools[0][:, len(sources) :]


def _indexed(pools, sources, targets) -> None:
    for pool in pools:
        pool[:, targets.long()] = pool[:, sources.long()]


def _index_copy(pools, sources, targets) -> None:
    for pool in pools:
        pool.index_copy_(1, targets.long(), pool.index_select(1, sources))
