"""Taking over the accepted states after speculative verification: all sequences and layers in one
launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.state_copy.copy import BLOCK_BYTES, copy_block


@triton.jit(do_not_specialize=["num_steps"])
def commit_kernel(
    p_step_states,
    p_states,
    p_slots,
    p_accepted,
    width,
    num_steps,
    step_layer_stride,
    layer_stride,
    slot_stride,
    BLOCK_BYTES: tl.constexpr,
):
    """Program (i_block, i_sequence, i_layer) moves one block of the state after the last accepted
    step."""
    i_sequence, i_layer = tl.program_id(1), tl.program_id(2).to(tl.int64)
    accepted = tl.load(p_accepted + i_sequence)
    if accepted == 0:
        return
    i_slot = tl.load(p_slots + i_sequence).to(tl.int64)
    i_step = (i_sequence * num_steps + accepted - 1).to(tl.int64)
    p_source = p_step_states + i_layer * step_layer_stride + i_step * width
    p_target = p_states + i_layer * layer_stride + i_slot * slot_stride
    copy_block(p_source, p_target, width, tl.program_id(0), BLOCK_BYTES)


def commit_states(
    step_states: torch.Tensor, states: torch.Tensor, slots: torch.Tensor, accepted: torch.Tensor
) -> None:
    """Make the state after each sequence's last accepted step its own, in all layers, with one
    launch.

    - ``step_states``: ``[L, B, steps, ...]`` as verification left them, contiguous. ``states``:
      ``[L, S, ...]`` of the same dtype, a state contiguous in its slot.
    - ``slots``: int32[B]. ``accepted``: int32[B], how many steps were accepted; 0 leaves the slot
      as it is. Both stay on the device: nothing waits for how many tokens were accepted.
    """
    if not step_states.is_contiguous() or not states[:1, :1].is_contiguous():
        raise ValueError("a state must be contiguous in its slot")
    if step_states.dtype != states.dtype:
        raise ValueError("step_states must have the dtype of states")
    if not step_states.numel():
        return
    width = states[0, 0].numel()
    num_layers, num_sequences, num_steps = step_states.shape[:3]
    grid = (triton.cdiv(width * states.element_size(), BLOCK_BYTES), num_sequences, num_layers)
    commit_kernel[grid](
        step_states,
        states,
        slots,
        accepted,
        width,
        num_steps,
        step_states.stride(0),
        states.stride(0),
        states.stride(1),
        BLOCK_BYTES=BLOCK_BYTES,
        num_warps=8,
    )
