"""Multi-head latent attention over a pool of latents in Triton.

It uses the online softmax of `kernels.attention.tile`, and loads each row once as key and as value.
All heads of a token attend to the same rows. The rows of a program are queries of HEADS heads and
BT tokens, BM in all. Each has an output of R numbers in registers: at R = 512 half of a
multiprocessor's registers. All tiles start at absolute positions. Parameters that determine the
bits (BN, SPLIT) depend only on the layer's shape and the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Unpack

import torch
import triton
import triton.language as tl

from kernels.attention.sequences import KVInputs, PackedKVInputs
from kernels.attention.splits import (
    COMBINED,
    SPLIT,
    combine_splits_kernel,
    count_splits,
    find_split,
    group_size,
    num_programs,
)
from kernels.attention.tile import LOG2_E
from kernels.strides import row_stride
from kernels.target import has_roomy_memory

MAX_HEADS = 16
"""Maximum heads of a token per program, the rows of the smallest product."""


@triton.jit
def attend(
    b_q,
    b_q_shared,
    p_indices,
    pool,
    first,
    kv_end,
    b_limit,
    pool_stride,
    scale,
    R: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute the online softmax of rows over positions ``first`` to ``kv_end``, in tiles of BN.

    Row i uses positions up to ``b_limit[i]``. Returns maxima (in powers of 2) and sums ``[BM]``,
    and weighted latents ``[BM, BR]``.
    """
    BM: tl.constexpr = b_q.shape[0]
    o_r, o_p = tl.arange(0, b_q.shape[1]), R + tl.arange(0, b_q_shared.shape[1])
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_o = tl.zeros(b_q.shape, tl.float32)
    for i_n in range(first, kv_end, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = (o_n < kv_end)[:, None]
        b_rows = tl.load(p_indices + o_n, mask=o_n < kv_end, other=0).to(tl.int64) * pool_stride
        m_latent = m_n if b_q.shape[1] == R else m_n & (o_r < R)
        b_latent = tl.load(pool + b_rows[:, None] + o_r, mask=m_latent, other=0.0)
        b_shared = tl.load(pool + b_rows[:, None] + o_p, mask=m_n & (o_p < D), other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_latent), input_precision="ieee")
        b_s = tl.dot(b_q_shared, tl.trans(b_shared), b_s, input_precision="ieee") * scale
        b_s = tl.where(o_n[None, :] <= b_limit[:, None], b_s, float("-inf"))
        b_m_new = tl.maximum(b_m, tl.max(b_s, axis=1))
        b_p = tl.exp2(b_s - b_m_new[:, None])
        b_decay = tl.exp2(b_m - b_m_new)
        b_l = b_l * b_decay + tl.sum(b_p, axis=1)
        b_p = b_p.to(b_latent.dtype)
        b_o = tl.dot(b_p, b_latent, b_o * b_decay[:, None], input_precision="ieee")
        b_m = b_m_new
    return b_m, b_l, b_o


@triton.jit
def prefill_mla_kernel(
    q,
    pool,
    out,
    table,
    rows,
    kv_lens,
    packed,
    table_stride,
    pool_stride,
    scale,
    H: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """Program (i_part, i_group): BT tokens of a tile, HEADS heads.

    The last tokens have the most rows, so they start first.
    """
    i_part = tl.num_programs(0) - 1 - tl.program_id(0)
    parts: tl.constexpr = TILE // BT
    i_tile = i_part // parts
    i_b = tl.load(packed.tile_sequences + i_tile)
    bos, eos = tl.load(packed.cu_seqlens + i_b), tl.load(packed.cu_seqlens + i_b + 1)
    kv_len = tl.load(kv_lens + i_b)
    first = (i_tile - tl.load(packed.cu_tiles + i_b)) * TILE + i_part % parts * BT
    if first < eos - bos:
        o_row = tl.arange(0, BT * HEADS)
        o_t, o_h = first + o_row // HEADS, tl.program_id(1) * HEADS + o_row % HEADS
        o_r, o_p = tl.arange(0, BR), R + tl.arange(0, BP)
        m_q = ((o_t < eos - bos) & (o_h < H))[:, None]
        o_token = ((bos + o_t).to(tl.int64) * H + o_h)[:, None]
        b_q = tl.load(q + o_token * D + o_r, mask=m_q & (o_r < R), other=0.0)
        b_q_shared = tl.load(q + o_token * D + o_p, mask=m_q & (o_p < D), other=0.0)
        start = kv_len - (eos - bos)
        p_indices = table + tl.load(rows + i_b).to(tl.int64) * table_stride
        kv_end = tl.minimum(start + first + BT, kv_len)
        _, b_l, b_o = attend(
            b_q, b_q_shared, p_indices, pool, 0, kv_end, start + o_t, pool_stride, scale,
            R, D, BN,
        )  # fmt: skip
        b_o = (b_o / b_l[:, None]).to(out.dtype.element_ty)
        tl.store(out + o_token * R + o_r, b_o, mask=m_q & (o_r < R))


@triton.jit(do_not_specialize=["num_sequences", "num_splits"])
def decode_mla_kernel(
    q,
    pool,
    partial_out,
    partial_lse,
    table,
    rows,
    kv_lens,
    num_sequences,
    num_splits,
    table_stride,
    pool_stride,
    scale,
    H: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
    HEADS: tl.constexpr,
    BS: tl.constexpr,
    BN: tl.constexpr,
):
    """Program (i, i_group): HEADS heads of a token; every split of BS rows from i on, in steps of
    the number of programs."""
    o_h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    o_r, o_p = tl.arange(0, BR), R + tl.arange(0, BP)
    m_q = (o_h < H)[:, None]
    for i in range(
        tl.program_id(0), count_splits(kv_lens, None, num_sequences, BS, 1), tl.num_programs(0)
    ):
        i_b, i_s = find_split(i, kv_lens, None, num_sequences, BS, 1)
        kv_len = tl.load(kv_lens + i_b)
        o_token = (i_b.to(tl.int64) * H + o_h)[:, None]
        b_q = tl.load(q + o_token * D + o_r, mask=m_q & (o_r < R), other=0.0)
        b_q_shared = tl.load(q + o_token * D + o_p, mask=m_q & (o_p < D), other=0.0)
        p_indices = table + tl.load(rows + i_b).to(tl.int64) * table_stride
        b_limit = tl.zeros([HEADS], tl.int32) + kv_len - 1
        kv_end = tl.minimum(i_s * BS + BS, kv_len)
        b_m, b_l, b_o = attend(
            b_q, b_q_shared, p_indices, pool, i_s * BS, kv_end, b_limit, pool_stride, scale,
            R, D, BN,
        )  # fmt: skip
        p_part = (i_b.to(tl.int64) * H + o_h) * num_splits + i_s
        p_out = partial_out + p_part[:, None] * R + o_r
        tl.store(p_out, b_o / b_l[:, None], mask=m_q & (o_r < R))
        tl.store(partial_lse + p_part, b_m + tl.log2(b_l), mask=o_h < H)


@triton.jit(do_not_specialize=["num_tokens"])
def multiply_heads_kernel(
    x,
    weight,
    out,
    num_tokens,
    stride_token,
    stride_head,
    H: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Program (i_n, i_t, i_h): BT tokens of one head times BN columns, summed BM at a time."""
    i_h = tl.program_id(2)
    o_t = (tl.program_id(1) * BT + tl.arange(0, BT)).to(tl.int64)[:, None]
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    x += o_t * stride_token + i_h * stride_head
    weight += i_h.to(tl.int64) * M * N + o_n
    b_out = tl.zeros([BT, BN], tl.float32)
    for i_m in range(0, M, BM):
        o_m = i_m + tl.arange(0, BM)
        b_x = tl.load(x + o_m, mask=(o_t < num_tokens) & (o_m < M), other=0.0)
        m_w = (o_m < M)[:, None] & (o_n < N)
        b_w = tl.load(weight + o_m[:, None] * N, mask=m_w, other=0.0)
        b_out = tl.dot(b_x, b_w, b_out, input_precision="ieee")
    mask = (o_t < num_tokens) & (o_n < N)
    tl.store(out + (o_t * H + i_h) * N + o_n, b_out.to(out.dtype.element_ty), mask=mask)


def prefill_mla(
    query: torch.Tensor,
    pool: torch.Tensor,
    *,
    rank: int,
    **where: Unpack[PackedKVInputs],
) -> torch.Tensor:
    """Compute attention of new tokens to themselves and to all earlier tokens.

    See ``reference.prefill_mla``. One launch. A token has equal bits for every chunk of its
    sequence that starts at a multiple of ``packed.tile_size``.
    """
    query, packed = query.contiguous(), where["packed"]
    table, sequences = where["table"], where["sequences"]
    num_heads, size = query.shape[1:]
    out = query.new_empty(*query.shape[:2], rank)
    heads = min(MAX_HEADS, triton.next_power_of_2(num_heads))
    roomy = query.dtype != torch.float32 and has_roomy_memory()
    tokens = min((64 if roomy else 16) // heads, packed.tile_size)
    num_parts = len(packed.tile_sequences) * (packed.tile_size // tokens)
    if num_parts:
        prefill_mla_kernel[num_parts, triton.cdiv(num_heads, heads)](
            query,
            pool,
            out,
            table,
            sequences.row_table,
            sequences.kv_len_table,
            packed.tables,
            table.stride(0),
            row_stride("a row of latents", pool),
            where["scale"] * LOG2_E,
            H=num_heads,
            HEADS=heads,
            TILE=packed.tile_size,
            BT=tokens,
            num_warps=8 if roomy else 4,
            **_tile_config(size, rank, query.dtype),
        )
    return out


def decode_mla(
    query: torch.Tensor,
    pool: torch.Tensor,
    *,
    rank: int,
    **where: Unpack[KVInputs],
) -> torch.Tensor:
    """Compute attention of one token per sequence; see ``reference.decode_mla``.

    Two launches per group of sequences that share a workspace. ``max(sequences.kv_lens)`` bounds
    the launch. The actual lengths are those in ``sequences.kv_len_table``.
    """
    query, table, sequences = query.contiguous(), where["table"], where["sequences"]
    batch, num_heads, size = query.shape
    out = query.new_empty(batch, num_heads, rank)
    if batch == 0:
        return out
    num_splits = triton.cdiv(max(sequences.kv_lens), SPLIT)
    group = group_size(num_heads, num_splits, rank)
    num_groups = triton.cdiv(num_heads, MAX_HEADS)
    partial_shape = (min(batch, group), num_heads, num_splits)
    partial_out = query.new_empty(*partial_shape, rank, dtype=torch.float32)
    partial_lse = query.new_empty(partial_shape, dtype=torch.float32)
    for first in range(0, batch, group):
        part = slice(first, first + group)
        kv_lens = sequences.kv_len_table[part]
        count = num_programs(len(kv_lens) * num_splits, num_groups)
        decode_mla_kernel[count, num_groups](
            query[part],
            pool,
            partial_out,
            partial_lse,
            table,
            sequences.row_table[part],
            kv_lens,
            len(kv_lens),
            num_splits,
            table.stride(0),
            row_stride("a row of latents", pool),
            where["scale"] * LOG2_E,
            H=num_heads,
            HEADS=MAX_HEADS,
            BS=SPLIT,
            num_warps=4,
            **_tile_config(size, rank, query.dtype),
        )
        combine_splits_kernel[len(kv_lens), num_heads](
            partial_out,
            partial_lse,
            kv_lens,
            None,
            out[part],
            num_splits,
            0,
            HQ=num_heads,
            D=rank,
            BS=SPLIT,
            SPLITS=COMBINED,
            num_warps=8,
        )
    return out


def multiply_heads(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute ``out[t, h] = x[t, h] @ weight[h]``: x ``[T, H, M]``, weight ``[H, M, N]``.

    Returns ``[T, H, N]``. One launch. A token's bits do not depend on the number of tokens.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    num_tokens, num_heads, inner = x.shape
    width = weight.shape[2]
    out = x.new_empty(num_tokens, num_heads, width)
    tokens, columns = 64, min(64, max(16, triton.next_power_of_2(width)))
    if num_tokens:
        grid = (triton.cdiv(width, columns), triton.cdiv(num_tokens, tokens), num_heads)
        multiply_heads_kernel[grid](
            x,
            weight.contiguous(),
            out,
            num_tokens,
            x.stride(0),
            x.stride(1),
            H=num_heads,
            M=inner,
            N=width,
            BT=tokens,
            BM=min(64, max(16, triton.next_power_of_2(inner))),
            BN=columns,
            num_warps=4,
        )
    return out


def prepare_heads(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return `multiply_heads` with this weight."""
    return partial(multiply_heads, weight=weight.contiguous())


def _tile_config(size: int, rank: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the tile sizes that determine the bits: row sizes and the tile of rows."""
    roomy = dtype != torch.float32 and has_roomy_memory()
    return {
        "R": rank,
        "D": size,
        "BR": max(16, triton.next_power_of_2(rank)),
        "BP": max(16, triton.next_power_of_2(size - rank)),
        "BN": 32 if roomy else 16,
        "num_stages": 3 if roomy else 1,
    }
