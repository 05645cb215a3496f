"""Recurrences with a state of ``[K, V]`` per head in Triton: token by token, or a prompt by tiles.

Shared by `kernels.gdn`, `kernels.kda` and `kernels.mamba2`, each with its own step for one token
and for one tile. A program holds ``[K, BV]`` of one state in registers, so a state is read once and
written once per token or prompt. At K = V = 128 in float32, a token takes 128 KiB per head for 0.1
MFLOP, so decoding is bound by memory bandwidth. V is divided so that a single sequence occupies
every multiprocessor.
"""

from __future__ import annotations

from typing import Unpack

import torch
import triton
import triton.language as tl

from kernels.packed import ScanInputs, StepInputs
from kernels.strides import row_stride
from kernels.target import fitting_stages, max_recurrence_warps

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
    step: triton.JITFunction,
    inputs: tuple[object, ...],
    out: torch.Tensor,
    *,
    num_groups: int,
    config: dict[str, int],
    **where: Unpack[StepInputs],
) -> torch.Tensor:
    """Launch ``decode_kernel`` once, and return ``out``: ``[T, HV, V]``.

    ``num_groups`` is H. ``config`` has ``num_warps``, and BV if it is not ``BLOCK_V``. It depends
    on the layer alone, so that decoding and verification have equal bits.
    """
    states, slots, packed = where["states"], where["slots"], where.get("packed")
    num_heads, key_dim, value_dim = states.shape[1:]
    config = {"BV": min(BLOCK_V, triton.next_power_of_2(value_dim))} | config
    if out.numel():
        decode_kernel[triton.cdiv(value_dim, config["BV"]), num_heads, len(slots)](
            inputs,
            out,
            states,
            slots,
            where.get("step_slots"),
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


@triton.jit
def tile_tokens(packed, i_tile, BT: tl.constexpr):
    """Return the tokens of a tile, and which of them exist: ``[BT]``."""
    i_sequence = tl.load(packed.tile_sequences + i_tile)
    first = tl.load(packed.cu_seqlens + i_sequence)
    first += (i_tile - tl.load(packed.cu_tiles + i_sequence)) * BT
    o_token = (first + tl.arange(0, BT)).to(tl.int64)
    return o_token, o_token < tl.load(packed.cu_seqlens + i_sequence + 1)


@triton.jit
def scan_kernel(
    inputs,
    p_out,
    p_states,
    p_slots,
    p_resumed,
    packed,
    exports,
    stride_slot,
    STEP: tl.constexpr,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Program (i_v, i_head, i_sequence): carries ``[K, BV]`` of a state through the tiles of a
    sequence. The loop runs from export to export. The last one is the sequence's own slot at its
    end.

    ``STEP(b_state, i_tile, i_head, o_token, m_token, o_k, o_v, inputs, H, HV, K, V, BT)`` returns
    the state after a tile, and the read-outs ``[BT, BV]`` of its tokens.
    """
    i_v, i_head, i_sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(packed.cu_seqlens + i_sequence).to(tl.int64)
    end = tl.load(packed.cu_seqlens + i_sequence + 1)
    if first == end:
        return
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_state = (o_k < K)[:, None] & (o_v < V)
    p_out += i_head * V + o_v
    p_states += i_head * K * V + o_k[:, None] * V + o_v

    i_slot = tl.load(p_slots + i_sequence).to(tl.int64)
    m_initial = m_state & tl.load(p_resumed + i_sequence)
    b_state = tl.load(p_states + i_slot * stride_slot, mask=m_initial, other=0.0)  # [BK, BV]
    b_state = b_state.to(tl.float32)
    i_first = tl.load(packed.cu_tiles + i_sequence).to(tl.int64)
    i_begin = tl.load(exports.cu_exports + i_sequence)
    i_last = tl.load(exports.cu_exports + i_sequence + 1)
    for i_stop in range(i_begin, i_last + 1):
        # Not carried by this loop: Triton 3.6 and 3.7 replace a carried number by its first value
        # if only the bounds of an inner loop use it.
        start = tl.load(exports.ends + i_stop - 1, mask=i_stop > i_begin, other=0)
        stop = tl.load(exports.ends + i_stop, mask=i_stop < i_last, other=end - first)
        i_target = tl.load(exports.slots + i_stop, mask=i_stop < i_last, other=i_slot)
        i_until = i_first + tl.cdiv(stop, BT)
        for i in range(i_first + tl.cdiv(start, BT), i_until):
            o_token = first + (i - i_first) * BT + o_t
            m_token = o_token[:, None] < end
            b_state, b_out = STEP(
                b_state, i, i_head, o_token, m_token, o_k, o_v, inputs, H, HV, K, V, BT
            )
            # Rounded as a resumed run would load it from a slot, so that it has equal bits.
            b_state = b_state.to(p_states.dtype.element_ty).to(tl.float32)
            p_row = p_out + o_token[:, None] * (HV * V)
            tl.store(p_row, b_out.to(p_out.dtype.element_ty), mask=m_token & (o_v < V))
        p_target = p_states + i_target.to(tl.int64) * stride_slot
        tl.store(p_target, b_state.to(p_states.dtype.element_ty), mask=m_state)


def scan(
    step: triton.JITFunction,
    inputs: tuple[object, ...],
    out: torch.Tensor,
    *,
    num_groups: int,
    config: dict[str, int],
    **where: Unpack[ScanInputs],
) -> torch.Tensor:
    """Launch ``scan_kernel`` once, and return ``out``: ``[T, HV, V]``. ``num_groups`` is H."""
    states, packed, exports = where["states"], where["packed"], where["exports"]
    num_heads, key_dim, value_dim = states.shape[1:]
    scan_kernel[triton.cdiv(value_dim, config["BV"]), num_heads, len(packed.lengths)](
        inputs,
        out,
        states,
        where["slots"],
        where["resumed"],
        packed.tables,
        exports.tables if exports else packed.no_exports,
        row_stride("a state", states),
        STEP=step,
        H=num_groups,
        HV=num_heads,
        K=key_dim,
        V=value_dim,
        BT=packed.tile_size,
        BK=block_of(key_dim),
        **config,
    )
    return out


def block_of(size: int) -> int:
    """Return the block for ``size`` keys or values: a power of two that products accept."""
    return max(16, triton.next_power_of_2(size))


def scan_config(
    dtype: torch.dtype,
    key_dim: int,
    value_dim: int,
    tile_size: int,
    *,
    operands: int,
    matrices: int,
    is_large: bool = False,
    **others: int,
) -> dict[str, int]:
    """Return the tile of V and the launch parameters, by the layer's shape and the device.

    A step loads ``operands`` of R x K, and ``matrices`` of R x R, for tiles of R tokens.
    ``is_large``: True if the state leaves few registers. ``others`` replace the defaults.
    """
    slow = is_large or dtype == torch.float32
    config = {
        "BV": max(16, min(16 if slow else 32, triton.next_power_of_2(value_dim))),
        "num_warps": 4,
        "num_stages": 1 if slow else 2,
    } | others
    block_k = block_of(key_dim)
    numbers = tile_size * (operands * block_k + matrices * tile_size + config["BV"])
    # At most four vectors; besides, the state as an operand.
    loads = dtype.itemsize * numbers + 4 * 4 * tile_size
    stages = fitting_stages(config["num_stages"], loads, dtype.itemsize * block_k * config["BV"])
    num_warps = min(config["num_warps"], max_recurrence_warps())
    return config | {"num_warps": num_warps, "num_stages": stages}
