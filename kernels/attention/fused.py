"""Attention over a KV pool in Triton.

A decode program takes one KV head and SPLIT keys of a sequence, one such split after the other. The
splits of all sequences are numbered on the device, so programs are shared among them by their
lengths. A second kernel combines the splits. A verify program is a decode program with several
tokens as its rows.

A prefill program takes a tile of query tokens (64; 32 in float32) and up to two heads of one KV
head. It walks the keys from position 0 in tiles of BN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Unpack

import torch
import triton
import triton.language as tl

from kernels.activation.fused import sigmoid_mul
from kernels.attention.sequences import KVInputs, PackedKVInputs
from kernels.attention.splits import (
    COMBINED,
    SPLIT,
    combine_splits_kernel,
    count_splits,
    find_split,
    group_size,
    is_one_chunk,
    num_programs,
)
from kernels.attention.tile import LOG2_E, attend_tile, keys_per_tile
from kernels.packed import Packed, running_sum
from kernels.strides import row_stride
from kernels.target import has_roomy_memory, pipeline_stages
from kernels.tuning import tuned

__all__ = ["decode_attention", "is_one_chunk", "prefill_attention", "verify_attention"]

# --- One token per sequence, or several drafted tokens --------------------------------------------

# Loads with loaded addresses take two stages of the pipeline for the addresses.
DECODE_STAGES = 5
PREFILL_STAGES = 4


@triton.jit
def attend_split(
    q, k, v, partial_out, partial_lse, p_indices, o_h, m_row, b_limit, i_s, end, num_splits,
    pool_stride, scale, D: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Attend rows ``o_h [BG]`` of the queries to split i_s of the keys up to ``end``, and store
    their partial outputs. A row without keys in the split stores NaN, which is never read."""
    BD: tl.constexpr = triton.next_power_of_2(D)
    BG: tl.constexpr = o_h.shape[0]
    o_d = tl.arange(0, BD)
    m_q = m_row[:, None] & (o_d < D)[None, :]
    b_q = tl.load(q + o_h[:, None] * D + o_d[None, :], mask=m_q, other=0.0)  # [BG, BD]
    b_m = tl.full([BG], float("-inf"), tl.float32)
    b_l = tl.zeros([BG], tl.float32)
    b_o = tl.zeros([BG, BD], tl.float32)
    kv_end = tl.minimum(i_s * BS + BS, end)
    for i_n in range(i_s * BS, kv_end, BN):
        b_m, b_l, b_o = attend_tile(
            b_q, b_m, b_l, b_o, p_indices, k, v, i_n + tl.arange(0, BN), b_limit, kv_end,
            pool_stride, scale, D, BD,
        )  # fmt: skip
    p_part = o_h * num_splits + i_s
    p_out = partial_out + p_part[:, None] * D + o_d[None, :]
    tl.store(p_out, b_o / b_l[:, None], mask=m_q)
    tl.store(partial_lse + p_part, b_m + tl.log2(b_l), mask=m_row)


@triton.jit(do_not_specialize=["num_sequences", "num_splits"])
def decode_attention_kernel(
    q,
    k,
    v,
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
    HQ: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BS: tl.constexpr,
    BN: tl.constexpr,
):
    """Program (i, i_kv): every split of a sequence from i on, in steps of the number of programs,
    for the heads of one KV head."""
    i_kv = tl.program_id(1)
    o_g = tl.arange(0, max(16, triton.next_power_of_2(G)))
    for i in range(
        tl.program_id(0), count_splits(kv_lens, None, num_sequences, BS, 1), tl.num_programs(0)
    ):
        i_b, i_s = find_split(i, kv_lens, None, num_sequences, BS, 1)
        kv_len = tl.load(kv_lens + i_b)
        o_h = i_b.to(tl.int64) * HQ + i_kv * G + o_g
        b_limit = tl.zeros(o_g.shape, tl.int32) + kv_len - 1
        p_indices = table + tl.load(rows + i_b).to(tl.int64) * table_stride
        attend_split(
            q, k + i_kv * D, v + i_kv * D, partial_out, partial_lse, p_indices, o_h, o_g < G,
            b_limit, i_s, kv_len, num_splits, pool_stride, scale, D, BS, BN,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_sequences", "num_splits"])
def verify_attention_kernel(
    q,
    k,
    v,
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
    token_kv_lens,
    cu_seqlens,
    HQ: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BS: tl.constexpr,
    BN: tl.constexpr,
):
    """Program (i, i_kv): as in `decode_attention_kernel`, with several tokens of a sequence.

    The tokens fill the rows that one token has there, so the bits are equal. Also stores the number
    of keys of each token, for `combine_splits_kernel`.
    """
    BG: tl.constexpr = max(16, triton.next_power_of_2(G))
    TOKENS: tl.constexpr = BG // G
    i_kv, o_row = tl.program_id(1), tl.arange(0, BG)
    total = count_splits(kv_lens, cu_seqlens, num_sequences, BS, TOKENS)
    for i in range(tl.program_id(0), total, tl.num_programs(0)):
        i_b, i_part = find_split(i, kv_lens, cu_seqlens, num_sequences, BS, TOKENS)
        kv_len = tl.load(kv_lens + i_b)
        i_group, i_s = i_part // tl.cdiv(kv_len, BS), i_part % tl.cdiv(kv_len, BS)
        bos, eos = tl.load(cu_seqlens + i_b), tl.load(cu_seqlens + i_b + 1)
        first = bos + i_group * TOKENS
        start = kv_len - (eos - bos)  # position of the sequence's first token here
        last = start + tl.minimum(first + TOKENS, eos) - bos  # keys of this block's last token
        o_t = first + o_row // G
        o_h = (o_t.to(tl.int64) - tl.load(cu_seqlens)) * HQ + i_kv * G + o_row % G
        m_row = (o_row < TOKENS * G) & (o_t < eos)
        b_limit = start + o_t - bos
        p_indices = table + tl.load(rows + i_b).to(tl.int64) * table_stride
        if i_s * BS < last:
            attend_split(
                q, k + i_kv * D, v + i_kv * D, partial_out, partial_lse, p_indices, o_h, m_row,
                b_limit, i_s, last, num_splits, pool_stride, scale, D, BS, BN,
            )  # fmt: skip
        if i_s == 0 and i_kv == 0:
            tl.store(token_kv_lens + o_h // HQ, b_limit + 1, mask=m_row & (o_row % G == 0))


def decode_attention(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    *,
    gate: torch.Tensor | None = None,
    **where: Unpack[KVInputs],
) -> torch.Tensor:
    """Compute attention of one token per sequence; see ``reference.decode_attention``.

    ``max(sequences.kv_lens)`` bounds the launch. The actual lengths are those in
    ``sequences.kv_len_table``.
    """
    return _launch(query, (key_pool, value_pool), gate, None, **where)


def verify_attention(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    *,
    gate: torch.Tensor | None = None,
    **where: Unpack[PackedKVInputs],
) -> torch.Tensor:
    """Compute causal attention of several tokens per sequence, with `decode_attention`'s bits.

    See ``reference.verify_attention``. ``max(sequences.kv_lens)`` and ``max(packed.lengths)`` bound
    the launch. The actual lengths are those in ``sequences.kv_len_table`` and, if all tokens are
    one chunk (`is_one_chunk`), in ``packed.cu_seqlens``. Several chunks are formed by
    ``packed.lengths``.
    """
    return _launch(query, (key_pool, value_pool), gate, **where)


def _launch(
    query: torch.Tensor,
    pools: tuple[torch.Tensor, torch.Tensor],
    gate: torch.Tensor | None,
    packed: Packed | None,
    **where: Unpack[KVInputs],
) -> torch.Tensor:
    """Attend one token of each sequence, or the tokens in ``packed``."""
    query, table, sequences = query.contiguous(), where["table"], where["sequences"]
    out = torch.empty_like(query)
    if not len(query):
        return out
    num_heads, size = query.shape[1:]
    num_kv_heads = pools[0].shape[1]
    group, lengths = num_heads // num_kv_heads, (1,) * len(query)
    num_splits, num_groups = triton.cdiv(max(sequences.kv_lens), SPLIT), 1
    if packed is not None:
        lengths = packed.lengths
        num_groups = triton.cdiv(max(lengths), max(16, triton.next_power_of_2(group)) // group)
    launch = {"num_warps": 4, "num_stages": pipeline_stages(DECODE_STAGES)}
    launch |= tuned("attention.decode_attention_kernel", query.dtype, size, group)
    starts = running_sum(lengths)
    for part in _chunks(starts, group_size(num_heads, num_splits, size)):
        tokens = slice(starts[part.start], starts[part.stop])
        num_tokens, num_sequences = tokens.stop - tokens.start, part.stop - part.start
        partial_out = query.new_empty(num_tokens, num_heads, num_splits, size, dtype=torch.float32)
        partial_lse = partial_out.new_empty(num_tokens, num_heads, num_splits)
        kv_lens = sequences.kv_len_table[part]
        kernel, token_kv_lens, more = decode_attention_kernel, kv_lens, tuple[torch.Tensor, ...]()
        if packed is not None:
            token_kv_lens = kv_lens.new_empty(num_tokens)
            kernel, more = verify_attention_kernel, (token_kv_lens, packed.cu_seqlens[part.start :])
        count = num_programs(num_sequences * num_groups * num_splits, num_kv_heads)
        kernel[count, num_kv_heads](
            query[tokens],
            *pools,
            partial_out,
            partial_lse,
            table,
            sequences.row_table[part],
            kv_lens,
            num_sequences,
            num_splits,
            table.stride(0),
            row_stride("a KV row", *pools),
            where["scale"] * LOG2_E,
            *more,
            HQ=num_heads,
            G=group,
            D=size,
            BS=SPLIT,
            BN=keys_per_tile(size, query.dtype),
            **launch,
        )
        combine_splits_kernel[num_tokens, num_heads](
            partial_out,
            partial_lse,
            token_kv_lens,
            None if gate is None else gate[tokens],
            out[tokens],
            num_splits,
            0 if gate is None else gate.stride(0),
            HQ=num_heads,
            D=size,
            BS=SPLIT,
            SPLITS=COMBINED,
            num_warps=4,
        )
    return out


def _chunks(starts: Sequence[int], max_tokens: int) -> Iterator[slice]:
    """Divide sequences into chunks of at most ``max_tokens`` tokens, and at least four sequences.

    ``starts`` has the start of each sequence, and the end of the last one. Sizes are multiples of
    four, so that the tables stay aligned.
    """
    begin, last = 0, len(starts) - 1
    while begin < last:
        end = min(begin + 4, last)
        while end < last and starts[min(end + 4, last)] - starts[begin] <= max_tokens:
            end = min(end + 4, last)
        yield slice(begin, end)
        begin = end


# --- Causal grouped-query attention of new tokens -------------------------------------------------


@triton.jit
def prefill_attention_kernel(
    q,
    k,
    v,
    out,
    table,
    rows,
    kv_lens,
    packed,
    table_stride,
    pool_stride,
    scale,
    HQ: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    BD: tl.constexpr = triton.next_power_of_2(D)
    BM: tl.constexpr = BT * HEADS
    # The last tiles of a sequence have the most keys, so they start first.
    i_part = tl.num_programs(0) - 1 - tl.program_id(0)
    parts: tl.constexpr = TILE // BT
    i_tile = i_part // parts
    i_h = tl.program_id(1) * HEADS
    i_b = tl.load(packed.tile_sequences + i_tile)
    bos, eos = tl.load(packed.cu_seqlens + i_b), tl.load(packed.cu_seqlens + i_b + 1)
    kv_len = tl.load(kv_lens + i_b)
    first = (i_tile - tl.load(packed.cu_tiles + i_b)) * TILE + i_part % parts * BT
    o_row = tl.arange(0, BM)
    o_q = first + o_row % BT  # tokens from the sequence's first new one
    o_h = i_h + o_row // BT
    o_d = tl.arange(0, BD)
    start = kv_len - (eos - bos)
    b_limit = start + o_q

    m_q = (o_q < eos - bos)[:, None] & (o_d < D)[None, :]
    p_q = ((bos + o_q).to(tl.int64) * HQ + o_h)[:, None] * D + o_d[None, :]
    b_q = tl.load(q + p_q, mask=m_q, other=0.0)  # [BM, BD]
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, BD], tl.float32)
    p_indices = table + tl.load(rows + i_b).to(tl.int64) * table_stride
    k += (i_h // G) * D
    v += (i_h // G) * D
    kv_end = tl.minimum(start + first + BT, kv_len)
    for i_n in range(0, kv_end, BN):
        b_m, b_l, b_o = attend_tile(
            b_q, b_m, b_l, b_o, p_indices, k, v, i_n + tl.arange(0, BN), b_limit, kv_end,
            pool_stride, scale, D, BD,
        )  # fmt: skip
    tl.store(out + p_q, (b_o / b_l[:, None]).to(out.dtype.element_ty), mask=m_q)


def prefill_attention(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    *,
    gate: torch.Tensor | None = None,
    **where: Unpack[PackedKVInputs],
) -> torch.Tensor:
    """Compute attention of new tokens to themselves and to all earlier tokens.

    See ``reference.prefill_attention``. A token has equal bits for every chunk of its sequence that
    starts at a multiple of ``packed.tile_size``.
    """
    query, packed = query.contiguous(), where["packed"]
    table, sequences = where["table"], where["sequences"]
    out = torch.empty_like(query)
    num_heads, size = query.shape[1:]
    group = num_heads // key_pool.shape[1]
    exact = query.dtype == torch.float32
    fits = size <= 128 or has_roomy_memory()
    heads = 2 if group % 2 == 0 and not exact and fits else 1
    tokens = min(32 if exact else 64, packed.tile_size)
    launch = {
        "num_warps": 8 if heads == 2 or (exact and size > 128) else 4,
        "num_stages": pipeline_stages(PREFILL_STAGES),
    }
    launch |= tuned("attention.prefill_attention_kernel", query.dtype, size, group)
    num_parts = len(packed.tile_sequences) * (packed.tile_size // tokens)
    if num_parts:
        prefill_attention_kernel[(num_parts, num_heads // heads)](
            query,
            key_pool,
            value_pool,
            out,
            table,
            sequences.row_table,
            sequences.kv_len_table,
            packed.tables,
            table.stride(0),
            row_stride("a KV row", key_pool, value_pool),
            where["scale"] * LOG2_E,
            HQ=num_heads,
            G=group,
            D=size,
            HEADS=heads,
            TILE=packed.tile_size,
            BT=tokens,
            BN=keys_per_tile(size, query.dtype),
            **launch,
        )
    # Not in the kernel, which would spill registers on an H100.
    return out if gate is None else sigmoid_mul(out.flatten(1), gate).view_as(out)
