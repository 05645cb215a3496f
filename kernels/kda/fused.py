"""Kimi Delta Attention in Triton, token by token and over prompts.

Over prompts, all tiles are computed in parallel, then one scan runs per sequence, head and slice of
V.

As in `kernels.gdn.fused`, but every channel of a key has its own decay. Row scales of a product
cannot express that, so the decays are applied to the operands. F and B are the products of a tile's
decays up to a token and after it, and ``<x, y>`` is as in `kernels.kda.reference`::

    `solve_kernel`:  T = (I + tril(beta <K, K>, -1))^-1 diag(beta)       P = <scale Q, K>
    `scan_tile`:    N = T (V - (F K) S)         O = (F scale Q) S + P N
    next state:      S <- F_R S + (B K)^T N

`solve_kernel` needs no state; it also writes F K, F scale Q and B K for the scan. `scan_tile`
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

from typing import NamedTuple, Unpack

import torch
import triton
import triton.language as tl

from kernels.gdn import fused as gdn
from kernels.gdn.fused import compute_gates, decode_delta, invert_unit_lower, write_and_read
from kernels.gdn.reference import Prompt, Step, scale_of
from kernels.packed import ScanInputs, StepInputs
from kernels.recurrence import block_of, scan, scan_config, tile_tokens
from kernels.strides import rows_contiguous

# --- Gates of prompts; the decode kernel computes its own -----------------------------------------


def gates(
    a: torch.Tensor, b: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log-decay and step size. One launch.

    The log-decay ``-exp(A_log) * softplus(a + dt_bias)`` is float32 ``[T, H, K]``. The step size
    ``sigmoid(b)`` is float32 ``[T, H]``.

    ``a``: ``[T, H, K]``. ``b``: ``[T, H]``. Each token is contiguous, with any stride between
    tokens. ``A_log``: ``[H]``. ``dt_bias``: ``[H, K]``.
    """
    return gdn.gates(a, b, A_log, dt_bias)


# --- Token by token: as `kernels.gdn`, with a decay vector over the rows of the state -------------


@triton.jit
def step(b_state, i_token, i_head, o_k, o_v, inputs,
         H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr):  # fmt: skip
    """Advance the state ``[BK, BV]`` by one token; see `kernels.recurrence`."""
    stride_q, stride_k, stride_v, stride_a, stride_b = inputs.strides
    m_k, m_v = o_k < K, o_v < V
    o_key = i_head * K + o_k
    b_q = tl.load(inputs.query + i_token * stride_q + o_key, mask=m_k, other=0.0)
    b_k = tl.load(inputs.key + i_token * stride_k + o_key, mask=m_k, other=0.0)
    b_v = tl.load(inputs.value + i_token * stride_v + i_head * V + o_v, mask=m_v, other=0.0)
    b_gate, b_beta = compute_gates(
        tl.load(inputs.a + i_token * stride_a + o_key, mask=m_k, other=0.0),
        tl.load(inputs.b + i_token * stride_b + i_head),
        tl.load(inputs.A_log + i_head),
        tl.load(inputs.dt_bias + o_key, mask=m_k, other=0.0),
        inputs.max_beta,
    )
    b_decay = tl.exp(b_gate)[:, None]
    return write_and_read(b_state, b_q, b_k, b_v, b_decay, b_beta, inputs.scale)


def decode_kda(token: Step, **where: Unpack[StepInputs]) -> torch.Tensor:
    """Compute one token of B sequences, or several with ``packed`` and ``step_slots``.

    One launch. Arguments, formula and source: `kernels.kda.reference`. Each token and each state is
    contiguous, with any stride between tokens and between slots. The number of tokens of each
    sequence is read from ``packed.cu_seqlens``.
    """
    return decode_delta(step, token, 1.0, {}, where)


# --- Prompts: all tiles in parallel, then one scan per sequence, head and slice of V --------------


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
    o_t = tl.arange(0, BT)
    o_i, o_j = o_t[:, None], o_t[None, :]
    o_token, m_token = tile_tokens(packed, i_tile, BT)
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


class KDATiles(NamedTuple):
    """Values, results of `solve_kernel`, and the stride between tokens, passed as one argument."""

    value: torch.Tensor
    matrices: torch.Tensor
    factors: torch.Tensor
    decay: torch.Tensor
    stride: int


@triton.jit
def scan_tile(b_state, i_tile, i_head, o_token, m_token, o_k, o_v, tiles,
              H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
              BT: tl.constexpr):  # fmt: skip
    """Advance the state ``[BK, BV]`` by one tile; see `kernels.recurrence`."""
    o_t, m_k = tl.arange(0, BT), o_k < K
    i_in = i_tile * H + i_head
    p_matrix = tiles.matrices + i_in * 2 * BT * BT + (o_t[:, None] * BT + o_t)
    p_factor = tiles.factors + i_in * 3 * BT * K + (o_t[:, None] * K + o_k)
    p_v = tiles.value + i_head * V + o_v + o_token[:, None] * tiles.stride
    b_v = tl.load(p_v, mask=m_token & (o_v < V), other=0.0)
    b_operand = b_state.to(b_v.dtype)
    b_reader = tl.load(p_factor, mask=m_k[None, :], other=0.0)
    b_new = b_v.to(tl.float32) - tl.dot(b_reader, b_operand, input_precision="ieee")
    b_new = tl.dot(tl.load(p_matrix), b_new.to(b_v.dtype), input_precision="ieee")
    b_query = tl.load(p_factor + BT * K, mask=m_k[None, :], other=0.0)
    b_out = tl.dot(b_query, b_operand, input_precision="ieee")
    b_new = b_new.to(b_v.dtype)
    b_out = tl.dot(tl.load(p_matrix + BT * BT), b_new, b_out, input_precision="ieee")
    b_decay = tl.load(tiles.decay + i_in * K + o_k, mask=m_k, other=0.0)
    b_writer = tl.load(p_factor + 2 * BT * K, mask=m_k[None, :], other=0.0)
    b_state *= b_decay[:, None]
    return tl.dot(tl.trans(b_writer), b_new, b_state, input_precision="ieee"), b_out


def chunk_kda(prompt: Prompt, **where: Unpack[ScanInputs]) -> torch.Tensor:
    """Compute Kimi Delta Attention over packed sequences by tiles; store each last state in its
    slot.

    Returns ``[T, H, V]`` in value's dtype. Two launches. They pass two R x R matrices and three
    R x K matrices per tile of R tokens and head. K up to 256, any V.
    Arguments, formula and source: `kernels.kda.reference`.
    """
    query, key, value = map(rows_contiguous, prompt[:3])
    gate, beta = prompt[3:]
    packed, (num_heads, key_dim), value_dim = where["packed"], key.shape[1:], value.shape[2]
    count, tile_size = len(packed.tile_sequences), packed.tile_size
    out = value.new_empty(value.shape)
    if not count:
        return out
    matrices = value.new_empty(count, num_heads, 2, tile_size, tile_size)
    factors = value.new_empty(count, num_heads, 3, tile_size, key_dim)
    decay = gate.new_empty(count, num_heads, key_dim, dtype=torch.float32)
    exact = value.dtype == torch.float32
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
        scale_of(prompt.key),
        H=num_heads,
        K=key_dim,
        LOG_BT=tile_size.bit_length() - 1,
        BK=min(block_of(key_dim), 32),
        DOT_TYPE=tl.float32 if exact else tl.float16,
        num_warps=8,
        num_stages=1,
    )
    return scan(
        scan_tile,
        KDATiles(value, matrices, factors, decay, value.stride(0)),
        out,
        num_groups=num_heads,
        config=scan_config(*(value.dtype, key_dim, value_dim, tile_size), operands=3, matrices=2),
        **where,
    )
