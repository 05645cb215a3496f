"""Recurrences with a state of ``[K, V]`` per head, token by token, in Triton.

Shared by `kernels.gdn`, `kernels.kda` and `kernels.mamba2`, each with its own ``step``. A
program holds ``[K, BV]`` of one state in registers, so a state is read once and written once per
token. At K = V = 128 in float32 this is 128 KiB per head and token for 0.1 MFLOP, so the kernel is
bound by memory bandwidth. V is divided so that a single sequence occupies every multiprocessor.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.packed import Packed
from kernels.strides import row_stride

BLOCK_V = 32
"""Columns of a state per program: rows of 128 bytes in float32."""


@triton.jit
def decode_kernel(
    inputs,
    p_out,
    p_states,
    p_slots,
    p_step_slots,
    p_cu_seqlens,
    stride_slot,
    STEP: tl.constexpr,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Program (i_v, i_head, i_sequence): carries ``[K, BV]`` of a state through a sequence's
    tokens, and stores the state after token t in slot ``p_step_slots[t]``. If that is None, each
    sequence has one token, and the state is updated in its slot.

    ``STEP(b_state, i_token, i_head, o_k, o_v, inputs, H, HV, K, V)`` returns the state after a
    token, and the token's read-out ``[BV]``.
    """
    i_v, i_head, i_sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_v = o_v < V
    mask = (o_k < K)[:, None] & m_v
    o_state = i_head * K * V + o_k[:, None] * V + o_v
    p_state = p_states + tl.load(p_slots + i_sequence).to(tl.int64) * stride_slot + o_state
    if p_step_slots is None:
        b_state = tl.load(p_state, mask=mask, other=0.0).to(tl.float32)
        b_state, b_out = STEP(b_state, i_sequence, i_head, o_k, o_v, inputs, H, HV, K, V)
        p_row = p_out + (i_sequence * HV + i_head) * V + o_v
        tl.store(p_row, b_out.to(p_out.dtype.element_ty), mask=m_v)
        tl.store(p_state, b_state.to(p_states.dtype.element_ty), mask=mask)
    else:
        first = tl.load(p_cu_seqlens + i_sequence).to(tl.int64)
        end = tl.load(p_cu_seqlens + i_sequence + 1).to(tl.int64)
        # A captured graph can have many empty sequences.
        b_state = tl.load(p_state, mask=mask & (first < end), other=0.0).to(tl.float32)
        for i_token in range(first, end):
            b_state, b_out = STEP(b_state, i_token, i_head, o_k, o_v, inputs, H, HV, K, V)
            p_row = p_out + (i_token * HV + i_head) * V + o_v
            tl.store(p_row, b_out.to(p_out.dtype.element_ty), mask=m_v)
            b_kept = b_state.to(p_states.dtype.element_ty)
            p_kept = p_states + tl.load(p_step_slots + i_token).to(tl.int64) * stride_slot
            tl.store(p_kept + o_state, b_kept, mask=mask)
            b_state = b_kept.to(tl.float32)


def decode(
    step: Any,
    inputs: tuple[Any, ...],
    out: torch.Tensor,
    *,
    num_groups: int,
    states: torch.Tensor,
    slots: torch.Tensor,
    packed: Packed | None,
    step_slots: torch.Tensor | None,
    config: dict[str, int],
) -> torch.Tensor:
    """Launch ``decode_kernel`` once, and return ``out``: ``[T, HV, V]``.

    ``num_groups`` is H. ``config`` has ``num_warps``, and BV if it is not ``BLOCK_V``. It depends
    on the layer alone, so that decoding and verification have equal bits.
    """
    num_heads, key_dim, value_dim = states.shape[1:]
    config = {"BV": min(BLOCK_V, triton.next_power_of_2(value_dim))} | config
    if out.numel():
        decode_kernel[triton.cdiv(value_dim, config["BV"]), num_heads, len(slots)](
            inputs,
            out,
            states,
            slots,
            step_slots,
            None if packed is None else packed.cu_seqlens,
            row_stride("a state", states),
            STEP=step,
            H=num_groups,
            HV=num_heads,
            K=key_dim,
            V=value_dim,
            BK=triton.next_power_of_2(key_dim),
            # The compiler would fuse products and sums differently with one token and with several.
            enable_fp_fusion=False,
            **config,
        )
    return out
