"""Mamba-2 over prompts in Triton: all tiles in parallel, then one scan per sequence, head and slice
of V.

As in `kernels.gdn.chunk`, row factors are kept out of the operands, and the scan reads unmodified
x, B and C::

    `weigh_kernel`, without a state:    P = (C B^T * L) diag(dt)
    `scan_kernel`, tile after tile:     O = exp(G) (C S) + P X + D X
    next state:                         S <- exp(G_R) S + B^T (dt exp(G_R - G) X)

Each tile of R tokens passes one R x R matrix and three vectors per head between the kernels.
The usual form of the state space dual writes the state of every tile to memory, in order to read
out all tiles at once. At K = 128, V = 64 in float32 this is 32 KiB per tile and head, written and
read, while P has 8 KiB in bfloat16. Here a state stays in registers and is stored only for exports.

Precision: 16-bit operands multiply in their own type and accumulate in float32; float32 operands
multiply in float32, never in tf32. The state, the skip and everything elementwise are float32. Each
reduction has one order, determined by its tile and head alone.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from kernels.gdn.chunk import pairwise_decay
from kernels.packed import Exports, Packed
from kernels.strides import row_stride, rows_contiguous
from kernels.target import has_roomy_memory, max_recurrence_warps
from kernels.tuning import tuned


@triton.jit
def weigh_kernel(
    p_b,
    p_c,
    p_gate,
    p_step,
    p_matrices,
    p_vectors,
    packed,
    stride_b,
    stride_c,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    HEADS: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Program (i_tile, i_part): HEADS heads of one group, which share C B^T.

    Writes P into ``p_matrices`` ``[N, HV, BT, BT]``, and the row scales of C S, of X and of the
    state into ``p_vectors`` ``[N, HV, 3, BT]``.
    """
    i_tile, i_first = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS
    i_group = i_first // (HV // H)
    i_sequence = tl.load(packed.tile_sequences + i_tile)
    first = tl.load(packed.cu_seqlens + i_sequence)
    first += (i_tile - tl.load(packed.cu_tiles + i_sequence)) * BT
    o_t = tl.arange(0, BT)
    o_token = (first + o_t).to(tl.int64)
    m_token = o_token < tl.load(packed.cu_seqlens + i_sequence + 1)

    p_b += i_group * K + o_token[:, None] * stride_b
    p_c += i_group * K + o_token[:, None] * stride_c
    b_cb = tl.zeros([BT, BT], dtype=tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        mask = m_token[:, None] & (o_k < K)
        b_b = tl.load(p_b + o_k, mask=mask, other=0.0)  # [BT, BK]
        b_c = tl.load(p_c + o_k, mask=mask, other=0.0)
        b_cb = tl.dot(b_c, tl.trans(b_b), b_cb, input_precision="ieee")

    for i_head in tl.range(i_first, i_first + HEADS, num_stages=1):
        b_gate = tl.load(p_gate + o_token * HV + i_head, mask=m_token, other=0.0).to(tl.float32)
        b_step = tl.load(p_step + o_token * HV + i_head, mask=m_token, other=0.0).to(tl.float32)
        b_gate = tl.cumsum(b_gate, axis=0)
        b_last = tl.sum(tl.where(o_t == BT - 1, b_gate, 0.0), axis=0)
        p_vector = p_vectors + (i_tile * HV + i_head) * 3 * BT + o_t
        tl.store(p_vector, tl.exp(b_gate))
        tl.store(p_vector + BT, tl.exp(b_last - b_gate) * b_step)
        tl.store(p_vector + 2 * BT, tl.exp(b_last) + tl.zeros([BT], dtype=tl.float32))
        b_weights = b_cb * pairwise_decay(b_gate) * b_step
        p_matrix = p_matrices + (i_tile * HV + i_head) * BT * BT + o_t[:, None] * BT + o_t
        tl.store(p_matrix, b_weights.to(p_matrices.dtype.element_ty))


@triton.jit
def scan_kernel(
    p_x,
    p_b,
    p_c,
    p_d,
    p_matrices,
    p_vectors,
    p_out,
    p_states,
    p_slots,
    p_resumed,
    packed,
    exports,
    strides,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Program (i_v, i_head, i_sequence): carries ``[K, BV]`` of one state through one sequence.

    The loop runs from export to export. The last one is the sequence's own slot at its end.
    """
    i_v, i_head, i_sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    stride_x, stride_b, stride_c, stride_slot = strides
    first = tl.load(packed.cu_seqlens + i_sequence).to(tl.int64)
    end = tl.load(packed.cu_seqlens + i_sequence + 1)
    if first == end:
        return
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_state = m_k[:, None] & m_v
    o_matrix = o_t[:, None] * BT + o_t
    p_b += i_head // (HV // H) * K + o_k
    p_c += i_head // (HV // H) * K + o_k
    p_x += i_head * V + o_v
    p_out += i_head * V + o_v
    p_states += i_head * K * V + o_k[:, None] * V + o_v
    skip = tl.load(p_d + i_head).to(tl.float32)

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
            p_matrix = p_matrices + (i * HV + i_head) * BT * BT + o_matrix
            p_vector = p_vectors + (i * HV + i_head) * 3 * BT + o_t
            b_x = tl.load(p_x + o_token[:, None] * stride_x, mask=m_token & m_v, other=0.0)
            b_c = tl.load(p_c + o_token[:, None] * stride_c, mask=m_token & m_k, other=0.0)
            b_out = tl.dot(b_c, b_state.to(b_c.dtype), input_precision="ieee")  # [BT, BV]
            b_out = b_out * tl.load(p_vector)[:, None] + b_x.to(tl.float32) * skip
            b_out = tl.dot(tl.load(p_matrix), b_x, b_out, input_precision="ieee")
            p_row = p_out + o_token[:, None] * (HV * V)
            tl.store(p_row, b_out.to(p_out.dtype.element_ty), mask=m_token & m_v)

            b_b = tl.load(p_b + o_token[:, None] * stride_b, mask=m_token & m_k, other=0.0)
            b_new = (b_x.to(tl.float32) * tl.load(p_vector + BT)[:, None]).to(b_b.dtype)
            b_state *= tl.load(p_vectors + (i * HV + i_head) * 3 * BT + 2 * BT)
            b_state = tl.dot(tl.trans(b_b), b_new, b_state, input_precision="ieee")
            # Rounded as a resumed run would load it from a slot, so that it has equal bits.
            b_state = b_state.to(p_states.dtype.element_ty).to(tl.float32)
        p_target = p_states + i_target.to(tl.int64) * stride_slot
        tl.store(p_target, b_state.to(p_states.dtype.element_ty), mask=m_state)


def chunk_mamba2(
    x: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    gate: torch.Tensor,
    step: torch.Tensor,
    D: torch.Tensor,
    *,
    states: torch.Tensor,
    packed: Packed,
    slots: torch.Tensor,
    resumed: torch.Tensor,
    exports: Exports | None,
) -> torch.Tensor:
    """Compute Mamba-2 over packed sequences by tiles; store each last state in its slot.

    - ``x``: ``[T, HV, V]``. ``B``, ``C``: ``[T, H, K]``, HV a multiple of H. All have one dtype.
      Each token is contiguous, with any stride between tokens.
    - ``gate``: ``[T, HV]`` log-decay, at most 0. ``step``: ``[T, HV]``, see
      `kernels.mamba2.gates`. ``D``: ``[HV]``.
    - ``states``: ``[S, HV, K, V]``, for one layer; changed in place at ``slots`` and at the
      exports' slots. A state is contiguous, with any stride between slots.
    - ``slots``: int32[B]. ``resumed``: bool[B]; False starts from zeros and ignores the slot. The
      slot of a sequence without tokens is not changed.

    Returns ``[T, HV, V]`` in x's dtype. Two launches. K up to 256 (above 128 some registers of the
    scan spill to memory on sm_90), any V. Formula and source: `kernels.mamba2.reference`.
    """
    x, B, C = (rows_contiguous(part) for part in (x, B, C))
    strides = (*(part.stride(0) for part in (x, B, C)), row_stride("a state", states))
    (num_heads, value_dim), (num_groups, key_dim) = x.shape[1:], B.shape[1:]
    num_tiles, num_sequences = len(packed.tile_sequences), len(packed.lengths)
    out = x.new_empty(x.shape)
    if not num_tiles:
        return out
    size = packed.tile_size
    matrices = x.new_empty(num_tiles, num_heads, size, size)
    vectors = gate.new_empty(num_tiles, num_heads, 3, size, dtype=torch.float32)
    exact = x.dtype == torch.float32
    group = num_heads // num_groups
    block_k = max(16, triton.next_power_of_2(key_dim))
    shared = has_roomy_memory() and not exact
    weighing = {"HEADS": min(group, 4) if shared else 1, "num_warps": 4, "num_stages": 2}
    weighing |= tuned("mamba2.weigh_kernel", x.dtype, key_dim)
    weighing["HEADS"] = math.gcd(weighing["HEADS"], group)
    scanning = scan_config(x.dtype, key_dim, value_dim)
    weigh_kernel[num_tiles, num_heads // weighing["HEADS"]](
        B,
        C,
        gate.contiguous(),
        step.contiguous(),
        matrices,
        vectors,
        packed.tables,
        B.stride(0),
        C.stride(0),
        H=num_groups,
        HV=num_heads,
        K=key_dim,
        BT=size,
        BK=min(block_k, 32 if exact else 64),
        **weighing,
    )
    scan_kernel[triton.cdiv(value_dim, scanning["BV"]), num_heads, num_sequences](
        x,
        B,
        C,
        D,
        matrices,
        vectors,
        out,
        states,
        slots,
        resumed,
        packed.tables,
        exports.tables if exports else packed.no_exports,
        strides,
        H=num_groups,
        HV=num_heads,
        K=key_dim,
        V=value_dim,
        BT=size,
        BK=block_k,
        **scanning,
    )
    return out


def scan_config(dtype: torch.dtype, key_dim: int, value_dim: int) -> dict[str, int]:
    """Return the tile of V and the launch parameters, by the layer's shape and the device."""
    exact, large = dtype == torch.float32, key_dim > 128
    config = {
        "BV": max(16, min(16 if exact or large else 32, triton.next_power_of_2(value_dim))),
        "num_warps": 4,
        "num_stages": 1 if exact or large else 2,
    }
    config |= tuned("mamba2.scan_kernel", dtype, key_dim, value_dim)
    return config | {"num_warps": min(config["num_warps"], max_recurrence_warps())}
