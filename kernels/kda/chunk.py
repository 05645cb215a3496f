"""Kimi Delta Attention over prompts in Triton: all tiles in parallel, then one scan per sequence,
head and slice of V.

As in `kernels.gdn.chunk`, but every channel of a key has its own decay. Row scales of a product
cannot express that, so the decays are applied to the operands. F and B are the products of a tile's
decays up to a token and after it, and ``<x, y>`` is as in `kernels.kda.reference`::

    `solve_kernel`:  T = (I + tril(beta <K, K>, -1))^-1 diag(beta)       P = <scale Q, K>
    `scan_kernel`:   N = T (V - (F K) S)         O = (F scale Q) S + P N
    next state:      S <- F_R S + (B K)^T N

`solve_kernel` needs no state; it also writes F K, F scale Q and B K for the scan. `scan_kernel`
walks tile after tile.

``<x, y>`` is summed over log2(R) levels for tiles of R tokens. Level s takes every two adjacent
blocks of s tokens and multiplies the later block's rows by the earlier block's, each with the
decays between it and their border. All factors are products of decays, at most 1, so underflow is
harmless. A level is computed as one product of the whole tile, of which only those blocks are kept.
The tensor cores do log2(R) times the work of one product, and no row is multiplied individually.

Precision: unit vectors times decays are at most 1, so 16-bit pairs multiply in float16, with 11
significant bits. The data for the scan is rounded to the dtype of the values. float32 operands
multiply in float32. Each reduction has one order, determined by its tile and head alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gdn.chunk import invert_unit_lower
from kernels.packed import Exports, Packed
from kernels.strides import row_stride, rows_contiguous
from kernels.target import fitting_stages, max_recurrence_warps


@triton.jit
def store_factor(p_factor, b_factor, m_k):
    """Store all rows of a factor ``[BT, BK]``."""
    tl.store(p_factor, b_factor.to(p_factor.dtype.element_ty), mask=m_k[None, :])


@triton.jit
def solve_kernel(
    p_q,
    p_k,
    p_gate,
    p_beta,
    p_matrices,
    p_factors,
    p_decay,
    packed,
    stride_q,
    stride_k,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    LOG_BT: tl.constexpr,
    BK: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):
    """Program (i_tile, i_head): solves one tile of one head.

    Writes T and P into ``p_matrices`` ``[N, H, 2, BT, BT]``. Writes the factors F K, F scale Q and
    B K into ``p_factors`` ``[N, H, 3, BT, K]``, and F_R into ``p_decay`` ``[N, H, K]``.
    """
    BT: tl.constexpr = 1 << LOG_BT
    i_tile, i_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_sequence = tl.load(packed.tile_sequences + i_tile)
    first = tl.load(packed.cu_seqlens + i_sequence)
    first += (i_tile - tl.load(packed.cu_tiles + i_sequence)) * BT
    end = tl.load(packed.cu_seqlens + i_sequence + 1)
    o_t = tl.arange(0, BT)
    o_i, o_j = o_t[:, None], o_t[None, :]
    o_token = (first + o_t).to(tl.int64)
    m_token = o_token < end
    p_q += i_head * K + o_token[:, None] * stride_q
    p_k += i_head * K + o_token[:, None] * stride_k
    p_gate += i_head * K + o_token[:, None] * (H * K)
    i_out = i_tile * H + i_head

    b_qq = tl.zeros([BT], dtype=tl.float32)
    b_kk = tl.zeros([BT], dtype=tl.float32)
    b_qk = tl.zeros([BT], dtype=tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        mask = m_token[:, None] & (o_k < K)
        b_q = tl.load(p_q + o_k, mask=mask, other=0.0).to(tl.float32)
        b_k = tl.load(p_k + o_k, mask=mask, other=0.0).to(tl.float32)
        b_qq += tl.sum(b_q * b_q, axis=1)
        b_kk += tl.sum(b_k * b_k, axis=1)
        b_qk += tl.sum(b_q * b_k, axis=1)
    b_q_norm = tl.rsqrt(b_qq + 1e-6) * scale
    b_k_norm = tl.rsqrt(b_kk + 1e-6)

    b_attention = tl.where(o_i == o_j, (b_qk * b_q_norm * b_k_norm)[:, None], 0.0)  # [BT, BT]
    b_system = tl.zeros([BT, BT], dtype=tl.float32)
    p_factor = p_factors + i_out * 3 * BT * K + o_i * K
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < K
        mask = m_token[:, None] & m_k
        b_q = tl.load(p_q + o_k, mask=mask, other=0.0).to(tl.float32) * b_q_norm[:, None]
        b_k = tl.load(p_k + o_k, mask=mask, other=0.0).to(tl.float32) * b_k_norm[:, None]
        b_since = tl.exp(tl.load(p_gate + o_k, mask=mask, other=0.0))
        b_until = tl.full([BT, BK], 1.0, dtype=tl.float32)
        size = 1
        for _ in range(LOG_BT):
            b_earlier = tl.trans((b_k * b_until).to(DOT_TYPE))
            # Rows of the later block of each pair, columns of the earlier one.
            of_pair = (o_i > o_j) & ((o_i ^ o_j) >= size) & ((o_i ^ o_j) < 2 * size)
            b_pairs = tl.dot((b_q * b_since).to(DOT_TYPE), b_earlier, input_precision="ieee")
            b_attention += tl.where(of_pair, b_pairs, 0.0)
            b_pairs = tl.dot((b_k * b_since).to(DOT_TYPE), b_earlier, input_precision="ieee")
            b_system += tl.where(of_pair, b_pairs, 0.0)
            o_end = tl.broadcast_to(o_i - (o_i & (2 * size - 1)) + size - 1, (BT, BK))
            b_first, b_second = tl.gather(b_since, o_end, 0), tl.gather(b_since, o_end + size, 0)
            is_later = (o_i & size) != 0
            b_since = tl.where(is_later, b_since * b_first, b_since)
            b_until = tl.where(is_later, b_until, b_until * b_second)
            size *= 2
        store_factor(p_factor + o_k, b_k * b_since, m_k)
        store_factor(p_factor + BT * K + o_k, b_q * b_since, m_k)
        store_factor(p_factor + 2 * BT * K + o_k, b_k * b_until, m_k)
        p_last = p_decay + i_out * K + o_k + tl.zeros_like(o_i)
        tl.store(p_last, b_since, mask=(o_i == BT - 1) & m_k)

    p_matrix = p_matrices + i_out * 2 * BT * BT + o_i * BT + o_j
    tl.store(p_matrix + BT * BT, b_attention.to(p_matrices.dtype.element_ty))
    b_beta = tl.load(p_beta + o_token * H + i_head, mask=m_token, other=0.0).to(tl.float32)
    b_inverse = invert_unit_lower(b_system * b_beta[:, None], LOG_BT, DOT_TYPE)
    tl.store(p_matrix, (b_inverse * b_beta).to(p_matrices.dtype.element_ty))


@triton.jit
def scan_kernel(
    p_v,
    p_matrices,
    p_factors,
    p_decay,
    p_out,
    p_states,
    p_slots,
    p_resumed,
    packed,
    exports,
    stride_v,
    stride_slot,
    H: tl.constexpr,
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
    first = tl.load(packed.cu_seqlens + i_sequence).to(tl.int64)
    end = tl.load(packed.cu_seqlens + i_sequence + 1)
    if first == end:
        return
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_state = m_k[:, None] & m_v
    o_matrix = o_t[:, None] * BT + o_t
    o_factor = o_t[:, None] * K + o_k
    p_v += i_head * V + o_v
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
            mask = (o_token < end)[:, None] & m_v
            i_in = i * H + i_head
            p_matrix = p_matrices + i_in * 2 * BT * BT + o_matrix
            p_factor = p_factors + i_in * 3 * BT * K + o_factor
            b_v = tl.load(p_v + o_token[:, None] * stride_v, mask=mask, other=0.0)
            b_operand = b_state.to(b_v.dtype)
            b_reader = tl.load(p_factor, mask=m_k[None, :], other=0.0)
            b_new = b_v.to(tl.float32) - tl.dot(b_reader, b_operand, input_precision="ieee")
            b_new = tl.dot(tl.load(p_matrix), b_new.to(b_v.dtype), input_precision="ieee")
            b_query = tl.load(p_factor + BT * K, mask=m_k[None, :], other=0.0)
            b_out = tl.dot(b_query, b_operand, input_precision="ieee")
            b_new = b_new.to(b_v.dtype)
            b_out = tl.dot(tl.load(p_matrix + BT * BT), b_new, b_out, input_precision="ieee")
            b_decay = tl.load(p_decay + i_in * K + o_k, mask=m_k, other=0.0)
            b_writer = tl.load(p_factor + 2 * BT * K, mask=m_k[None, :], other=0.0)
            b_state *= b_decay[:, None]
            b_state = tl.dot(tl.trans(b_writer), b_new, b_state, input_precision="ieee")
            # Rounded as a resumed run would load it from a slot, so that it has equal bits.
            b_state = b_state.to(p_states.dtype.element_ty).to(tl.float32)
            tl.store(p_out + o_token[:, None] * (H * V), b_out.to(p_out.dtype.element_ty), mask)
        p_target = p_states + i_target.to(tl.int64) * stride_slot
        tl.store(p_target, b_state.to(p_states.dtype.element_ty), mask=m_state)


def chunk_kda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    beta: torch.Tensor,
    *,
    states: torch.Tensor,
    packed: Packed,
    slots: torch.Tensor,
    resumed: torch.Tensor,
    exports: Exports | None,
    scale: float | None = None,
) -> torch.Tensor:
    """Compute Kimi Delta Attention over packed sequences by tiles; store each last state in its
    slot.

    - ``query``, ``key``: ``[T, H, K]``, L2-normalised inside. ``value``: ``[T, H, V]``. All have
      one dtype. The heads of a token are contiguous, with any stride between tokens.
    - ``gate``: ``[T, H, K]`` float32 log-decay, at most 0. ``beta``: ``[T, H]``.
    - ``states``: ``[S, H, K, V]``, for one layer; changed in place at ``slots`` and at the exports'
      slots. A state is contiguous, with any stride between slots.
    - ``slots``: int32[B]. ``resumed``: bool[B]; False starts from zeros and ignores the slot. The
      slot of a sequence without tokens is not changed.
    - ``scale``: scale of the query; ``K ** -0.5`` if None.

    Returns ``[T, H, V]`` in value's dtype. Two launches. They pass two R x R matrices and three
    R x K matrices per tile of R tokens and head. K up to 256, any V.
    Formula and source: `kernels.kda.reference`.
    """
    query, key, value = (rows_contiguous(x) for x in (query, key, value))
    num_heads, key_dim = key.shape[1:]
    value_dim, count = value.shape[2], len(packed.tile_sequences)
    stride_slot = row_stride("a state", states)
    out = value.new_empty(value.shape)
    if not count:
        return out
    tile_size = packed.tile_size
    matrices = value.new_empty(count, num_heads, 2, tile_size, tile_size)
    factors = value.new_empty(count, num_heads, 3, tile_size, key_dim)
    decay = gate.new_empty(count, num_heads, key_dim, dtype=torch.float32)
    exact = value.dtype == torch.float32
    block_k = max(16, triton.next_power_of_2(key_dim))
    solve_kernel[count, num_heads](
        query,
        key,
        gate.float().contiguous(),
        beta.contiguous(),
        matrices,
        factors,
        decay,
        packed.tables,
        query.stride(0),
        key.stride(0),
        scale or key_dim**-0.5,
        H=num_heads,
        K=key_dim,
        LOG_BT=tile_size.bit_length() - 1,
        BK=min(block_k, 32),
        DOT_TYPE=tl.float32 if exact else tl.float16,
        num_warps=8,
        num_stages=1,
    )
    block_v = max(16, min(16 if exact else 32, triton.next_power_of_2(value_dim)))
    # Three factors, two matrices, and the values; besides, the state as an operand.
    numbers = tile_size * (3 * block_k + 2 * tile_size + block_v)
    stages = fitting_stages(
        1 if exact else 2, value.element_size() * numbers, value.element_size() * block_k * block_v
    )
    scan_kernel[triton.cdiv(value_dim, block_v), num_heads, len(packed.lengths)](
        value,
        matrices,
        factors,
        decay,
        out,
        states,
        slots,
        resumed,
        packed.tables,
        exports.tables if exports else packed.no_exports,
        value.stride(0),
        stride_slot,
        H=num_heads,
        K=key_dim,
        V=value_dim,
        BT=tile_size,
        BK=block_k,
        BV=block_v,
        num_warps=min(4, max_recurrence_warps()),
        num_stages=stages,
    )
    return out
