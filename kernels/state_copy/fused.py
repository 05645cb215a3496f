"""Copies of states between slots in Triton: all slots, layers and pools in one launch.

Compressed checkpoints are written in plain PyTorch on every device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kernels.state_copy.reference import narrow_states as narrow_states
from kernels.state_copy.reference import widen_states as widen_states
from kernels.tuning import tuned

BLOCK_BYTES = 16384


@triton.jit(do_not_specialize_on_alignment=["p_sources", "p_targets"])
def copy_kernel(
    p_pools, widths, layer_strides, slot_strides, p_sources, p_targets, BLOCK_BYTES: tl.constexpr
):
    """Program (i_block, i_copy, i_layer): moves one block of a state in every pool that has it."""
    i_layer = tl.program_id(2).to(tl.int64)
    i_source = tl.load(p_sources + tl.program_id(1)).to(tl.int64)
    i_target = tl.load(p_targets + tl.program_id(1)).to(tl.int64)
    for i_pool in tl.static_range(len(p_pools)):
        p_layer = p_pools[i_pool] + i_layer * layer_strides[i_pool]
        p_source = p_layer + i_source * slot_strides[i_pool]
        p_target = p_layer + i_target * slot_strides[i_pool]
        copy_block(p_source, p_target, widths[i_pool], tl.program_id(0), BLOCK_BYTES)


@triton.jit
def copy_block(p_source, p_target, width, i_block, BLOCK_BYTES: tl.constexpr):
    """Copy block ``i_block`` of ``width`` elements.

    Blocks have equal bytes for all dtypes, so that wide loads suit each pool.
    """
    BLOCK: tl.constexpr = BLOCK_BYTES * 8 // p_source.dtype.element_ty.primitive_bitwidth
    o_element = i_block * BLOCK + tl.arange(0, BLOCK)
    mask = o_element < width
    tl.store(p_target + o_element, tl.load(p_source + o_element, mask=mask), mask=mask)


def copy_states(
    pools: Sequence[torch.Tensor], sources: torch.Tensor, targets: torch.Tensor
) -> None:
    """Copy states between slots: ``pool[:, targets[n]] = pool[:, sources[n]]`` in every pool.

    - ``pools``: each ``[L, S, ...]``, of any dtype and the same L. A state is contiguous, with any
      stride between layers and slots. Whole slabs of an arena are one pool ``[1, S, bytes]``.
    - ``sources``, ``targets``: int32[N]. Targets are distinct and none of them is a source, so the
      order does not matter.

    One launch, bound by memory bandwidth: moves ``2 * N`` states of each pool.
    """
    flat = [pool.flatten(2) if pool.dim() > 3 else pool for pool in pools]
    if any(
        pool.stride(2) != 1 or pool.data_ptr() != given.data_ptr()
        for pool, given in zip(flat, pools, strict=True)
    ):
        raise ValueError("a state must be contiguous in its slot")
    if not len(sources):
        return
    config = {"BLOCK_BYTES": BLOCK_BYTES, "num_warps": 8} | tuned("state_copy.copy_kernel")
    widest = max(pool.shape[2] * pool.element_size() for pool in flat)
    grid = (triton.cdiv(widest, config["BLOCK_BYTES"]), len(sources), flat[0].shape[0])
    copy_kernel[grid](
        tuple(flat),
        tuple(pool.shape[2] for pool in flat),
        tuple(pool.stride(0) for pool in flat),
        tuple(pool.stride(1) for pool in flat),
        sources,
        targets,
        **config,
    )
