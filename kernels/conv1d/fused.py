"""Causal depthwise convolution with optional SiLU in Triton. Formula and source:
`kernels.conv1d.reference`.

Every input is read from memory once and W - 1 times from the cache, and every output is written
once. This is 4 bytes per token and channel in bfloat16, bound by memory bandwidth. A single
program, that of a sequence's first tile, reads and replaces the sequence's window. No program can
read a partially replaced one.
"""

from __future__ import annotations

from typing import Unpack

import torch
import triton
import triton.language as tl

from kernels.conv1d.reference import check_window
from kernels.packed import ScanInputs, StepInputs
from kernels.strides import row_stride, rows_contiguous
from kernels.tuning import tuned


@triton.jit
def load_input(
    p_sequence, p_window, position, o_c, stride_x, resumed, C: tl.constexpr, W: tl.constexpr
):
    """Load inputs ``[BC]`` at a position counted from the sequence's start.

    Positions -(W - 1) to -1 are the window.
    """
    p_x = p_sequence + position.to(tl.int64) * stride_x + o_c
    b_x = tl.load(p_x, mask=(o_c < C) & (position >= 0), other=0.0).to(tl.float32)
    p_old = p_window + o_c * (W - 1) + (W - 1 + position)
    return b_x + tl.load(p_old, mask=(o_c < C) & (position < 0) & resumed, other=0.0).to(tl.float32)


@triton.jit
def save_window(
    p_sequence, p_window, p_target, end, o_c, stride_x, resumed, C: tl.constexpr, W: tl.constexpr
):
    """Store the window after ``end >= 1`` tokens.

    Also works in place, since each element is read from a later position.
    """
    for i_w in tl.static_range(W - 1):
        b_x = load_input(p_sequence, p_window, end - (W - 1) + i_w, o_c, stride_x, resumed, C, W)
        tl.store(p_target + o_c * (W - 1) + i_w, b_x.to(p_target.dtype.element_ty), mask=o_c < C)


@triton.jit
def activate(b_total, p_bias, o_c, C: tl.constexpr, SILU: tl.constexpr):
    """Compute ``silu(total + bias)``, or the sum without SiLU."""
    if p_bias is not None:
        b_total += tl.load(p_bias + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    if SILU:
        b_total = b_total / (1.0 + tl.exp(-b_total))
    return b_total


@triton.jit
def prefill_kernel(
    p_x,
    p_weight,
    p_bias,
    p_out,
    p_states,
    p_slots,
    p_resumed,
    packed,
    exports,
    stride_x,
    stride_slot,
    C: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """Program (i_c, i_tile): BC channels of one tile, and the windows that end in it."""
    i_c, i_tile = tl.program_id(0), tl.program_id(1)
    i_sequence = tl.load(packed.tile_sequences + i_tile)
    first = tl.load(packed.cu_seqlens + i_sequence).to(tl.int64)
    length = (tl.load(packed.cu_seqlens + i_sequence + 1) - first).to(tl.int32)
    i_local = i_tile - tl.load(packed.cu_tiles + i_sequence)
    resumed = tl.load(p_resumed + i_sequence)
    p_window = p_states + tl.load(p_slots + i_sequence).to(tl.int64) * stride_slot
    p_sequence = p_x + first * stride_x

    o_c = i_c * BC + tl.arange(0, BC)
    o_t = i_local * BT + tl.arange(0, BT)
    m_out = (o_t < length)[:, None] & (o_c < C)
    b_total = tl.zeros([BT, BC], dtype=tl.float32)
    for i_w in tl.static_range(W):
        o_x = o_t - (W - 1) + i_w
        p_row = p_sequence + o_x.to(tl.int64)[:, None] * stride_x + o_c
        b_x = tl.load(p_row, mask=m_out & (o_x >= 0)[:, None], other=0.0).to(tl.float32)
        if i_local == 0:
            for i_t in tl.static_range(W - 1 - i_w):
                p_old = p_window + o_c * (W - 1) + i_t + i_w
                b_old = tl.load(p_old, mask=(o_c < C) & resumed, other=0.0).to(tl.float32)
                b_x = tl.where((o_t == i_t)[:, None], b_old, b_x)
        b_total += b_x * tl.load(p_weight + o_c * W + i_w, mask=o_c < C, other=0.0).to(tl.float32)
    p_row = p_out + (first + o_t)[:, None] * C + o_c
    tl.store(p_row, activate(b_total, p_bias, o_c, C, SILU).to(p_out.dtype.element_ty), mask=m_out)

    i_last = tl.load(exports.cu_exports + i_sequence + 1)
    for i_export in range(tl.load(exports.cu_exports + i_sequence), i_last):
        end = tl.load(exports.ends + i_export)
        if tl.cdiv(end, BT) - 1 == i_local:
            i_slot = tl.load(exports.slots + i_export).to(tl.int64)
            p_target = p_states + i_slot * stride_slot
            save_window(p_sequence, p_window, p_target, end, o_c, stride_x, resumed, C, W)
    if i_local == 0:
        tl.debug_barrier()  # all threads have read the old window
        save_window(p_sequence, p_window, p_window, length, o_c, stride_x, resumed, C, W)


@triton.jit
def decode_kernel(
    p_x,
    p_weight,
    p_bias,
    p_out,
    p_states,
    p_slots,
    p_step_slots,
    p_cu_seqlens,
    stride_x,
    stride_slot,
    C: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    BC: tl.constexpr,
):
    """Program (i_c, i_sequence): BC channels of the sequence's tokens, one after another.

    The window after token t is stored in slot ``p_step_slots[t]``. If that is None, each sequence
    has one token, and the window replaces the one in its slot.
    """
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    i_sequence = tl.program_id(1).to(tl.int64)
    p_window = p_states + tl.load(p_slots + i_sequence).to(tl.int64) * stride_slot
    first, end = i_sequence, i_sequence + 1
    if p_cu_seqlens is not None:
        first = tl.load(p_cu_seqlens + i_sequence).to(tl.int64)
        end = tl.load(p_cu_seqlens + i_sequence + 1).to(tl.int64)
    p_sequence = p_x + first * stride_x
    for i_token in range(first, end):
        i_step = (i_token - first).to(tl.int32)
        b_total = tl.zeros([BC], dtype=tl.float32)
        for i_w in tl.static_range(W):
            position = i_step - (W - 1) + i_w
            b_x = load_input(p_sequence, p_window, position, o_c, stride_x, True, C, W)
            b_tap = tl.load(p_weight + o_c * W + i_w, mask=o_c < C, other=0.0)
            b_total += b_x * b_tap.to(tl.float32)
        b_out = activate(b_total, p_bias, o_c, C, SILU).to(p_out.dtype.element_ty)
        tl.store(p_out + i_token * C + o_c, b_out, mask=o_c < C)
        p_target = p_window
        if p_step_slots is not None:
            p_target = p_states + tl.load(p_step_slots + i_token).to(tl.int64) * stride_slot
        # All threads must have read the old window, which can be the target, also of a step slot.
        tl.debug_barrier()
        save_window(p_sequence, p_window, p_target, i_step + 1, o_c, stride_x, True, C, W)


def prefill_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    silu: bool = True,
    **where: Unpack[ScanInputs],
) -> torch.Tensor:
    """Convolve packed sequences from the windows in their slots, and store their last windows.

    One launch.

    - ``x``: ``[T, C]``; the channels of a token are contiguous, with any stride between tokens.
      ``weight``: ``[C, W]``. ``bias``: ``[C]`` or None.
    - ``where``: windows ``[S, C, W - 1]`` and their slots; see `kernels.packed.ScanInputs`.
    - ``silu``: True to apply SiLU to the sums.

    Returns ``[T, C]`` in x's dtype.
    """
    states, packed, exports = where["states"], where["packed"], where["exports"]
    check_window(x, weight, states)
    x = rows_contiguous(x)
    out = x.new_empty(x.shape)
    num_channels, width = weight.shape
    num_tiles = len(packed.tile_sequences)
    if not num_tiles:
        return out
    config = {"BC": min(64, triton.next_power_of_2(num_channels)), "num_warps": 4}
    config |= tuned("conv1d.prefill_kernel", num_channels, width)
    prefill_kernel[triton.cdiv(num_channels, config["BC"]), num_tiles](
        x,
        weight.contiguous(),
        bias,
        out,
        states,
        where["slots"],
        where["resumed"],
        packed.tables,
        exports.tables if exports else packed.no_exports,
        x.stride(0),
        row_stride("a window", states),
        C=num_channels,
        W=width,
        SILU=silu,
        BT=packed.tile_size,
        **config,
    )
    return out


def decode_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    silu: bool = True,
    **where: Unpack[StepInputs],
) -> torch.Tensor:
    """Convolve one token of B sequences, or several with ``packed`` and ``step_slots``.

    One launch. See ``reference.decode_conv1d``; layouts are those of `prefill_conv1d`. The number
    of tokens of each sequence is read from ``packed.cu_seqlens``.
    """
    states, slots, packed = where["states"], where["slots"], where.get("packed")
    check_window(x, weight, states)
    x = rows_contiguous(x)
    out = x.new_empty(x.shape)
    num_channels, width = weight.shape
    config = {"BC": min(256, triton.next_power_of_2(num_channels)), "num_warps": 2}
    config |= tuned("conv1d.decode_kernel", num_channels, width)
    if len(x):
        decode_kernel[triton.cdiv(num_channels, config["BC"]), len(slots)](
            x,
            weight.contiguous(),
            bias,
            out,
            states,
            slots,
            where.get("step_slots"),
            None if packed is None else packed.cu_seqlens,
            x.stride(0),
            row_stride("a window", states),
            C=num_channels,
            W=width,
            SILU=silu,
            **config,
        )
    return out
