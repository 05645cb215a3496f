"""Causal grouped-query attention over a KV pool in Triton: FlashAttention's online softmax (Dao et
al., 2022) with every cut at an absolute position, so that a row's arithmetic depends on its own
position and keys alone.

A prefill program takes a tile of query tokens (64; 32 in float32) and up to two heads of one KV
head, and walks the keys from position 0 in tiles of BN. A decode program takes one sequence, one KV
head and SPLIT keys; a second kernel joins the splits, 32 side by side, then the next 32. Key tiles
past a query's position leave its running maximum, sum and output as they are, bit for bit: it makes
no difference whether a tile was walked over masked or not at all. A verify program is a decode
program whose rows are several tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.attention.sequences import Sequences
from kernels.packed import Packed, running_sum
from kernels.strides import row_stride
from kernels.target import has_roomy_memory, pipeline_stages
from kernels.tuning import tuned

# A pipeline over loads whose addresses are loaded too spends two stages on the first of them.
PREFILL_STAGES = 4
DECODE_STAGES = 5

SPLIT = 256
"""Keys per decode program. Partial outputs are written in float32: 1/64 of the KV traffic per query
head of a KV head."""

WORKSPACE_BYTES = 2**26
"""Most of what the partial outputs take: more sequences than fit are decoded one group after the
other. 64 sequences of 128k tokens and 16 heads of 256 would want half a GiB."""

COMBINED = 32
"""Splits that are joined at once: 128k tokens are 16 turns of a loop, not 512."""
COMBINE_STAGES = tl.constexpr(2)

LOG2_E = 1.4426950408889634


@triton.jit
def attend_tile(
    b_q,
    b_m,
    b_l,
    b_o,
    p_indices,
    k,
    v,
    o_n,
    b_limit,
    kv_end,
    pool_stride,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds keys at positions ``o_n [BN]`` to the running softmax of rows that see positions up to
    ``b_limit [BM]``.

    ``b_q [BM, BD]``; ``b_m``, ``b_l [BM]`` running maximum (in powers of 2) and sum; ``b_o [BM,
    BD]`` the weighted values.
    """
    o_d = tl.arange(0, BD)
    m_n = o_n < kv_end
    b_rows = tl.load(p_indices + o_n, mask=m_n, other=0).to(tl.int64) * pool_stride
    p_kv = b_rows[:, None] + o_d[None, :]
    mask = m_n[:, None] & (o_d < D)[None, :]
    b_k = tl.load(k + p_kv, mask=mask, other=0.0)  # [BN, BD]
    b_v = tl.load(v + p_kv, mask=mask, other=0.0)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale  # [BM, BN]
    b_s = tl.where(o_n[None, :] <= b_limit[:, None], b_s, float("-inf"))
    b_m_new = tl.maximum(b_m, tl.max(b_s, axis=1))
    b_p = tl.exp2(b_s - b_m_new[:, None])
    b_decay = tl.exp2(b_m - b_m_new)
    b_l = b_l * b_decay + tl.sum(b_p, axis=1)
    b_o = b_o * b_decay[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
    return b_m_new, b_l, b_o


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
    PRECISION: tl.constexpr,
):
    BD: tl.constexpr = triton.next_power_of_2(D)
    BM: tl.constexpr = BT * HEADS
    # The last tiles of a sequence see the most keys: start with them.
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
            pool_stride, scale, D, BD, PRECISION,
        )  # fmt: skip
    tl.store(out + p_q, (b_o / b_l[:, None]).to(out.dtype.element_ty), mask=m_q)


@triton.jit
def decode_attention_kernel(
    q,
    k,
    v,
    partial_out,
    partial_lse,
    table,
    rows,
    kv_lens,
    table_stride,
    pool_stride,
    scale,
    HQ: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BS: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    BD: tl.constexpr = triton.next_power_of_2(D)
    BG: tl.constexpr = max(16, triton.next_power_of_2(G))
    i_b, i_kv, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_len = tl.load(kv_lens + i_b)
    if i_s * BS < kv_len:
        o_g, o_d = tl.arange(0, BG), tl.arange(0, BD)
        o_h = i_b.to(tl.int64) * HQ + i_kv * G + o_g
        m_q = (o_g < G)[:, None] & (o_d < D)[None, :]
        b_q = tl.load(q + o_h[:, None] * D + o_d[None, :], mask=m_q, other=0.0)  # [BG, BD]
        b_m = tl.full([BG], float("-inf"), tl.float32)
        b_l = tl.zeros([BG], tl.float32)
        b_o = tl.zeros([BG, BD], tl.float32)
        b_limit = tl.zeros([BG], tl.int32) + kv_len - 1
        p_indices = table + tl.load(rows + i_b).to(tl.int64) * table_stride
        kv_end = tl.minimum(i_s * BS + BS, kv_len)
        for i_n in range(i_s * BS, kv_end, BN):
            b_m, b_l, b_o = attend_tile(
                b_q, b_m, b_l, b_o, p_indices, k + i_kv * D, v + i_kv * D,
                i_n + tl.arange(0, BN), b_limit,
                kv_end, pool_stride, scale, D, BD, PRECISION,
            )  # fmt: skip
        p_part = o_h * tl.num_programs(2) + i_s
        tl.store(partial_out + p_part[:, None] * D + o_d[None, :], b_o / b_l[:, None], mask=m_q)
        tl.store(partial_lse + p_part, b_m + tl.log2(b_l), mask=o_g < G)


@triton.jit(do_not_specialize=["num_groups"])
def verify_attention_kernel(
    q,
    k,
    v,
    partial_out,
    partial_lse,
    token_kv_lens,
    table,
    rows,
    kv_lens,
    cu_seqlens,
    num_groups,
    table_stride,
    pool_stride,
    scale,
    HQ: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BS: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (i_sequence * num_groups + i_group, i_kv, i_s): as many of a sequence's tokens as fit
    into the rows that one takes in `decode_attention_kernel`, so that the bits are those, and BS
    keys. Writes also how many keys each token sees, for `combine_splits_kernel`."""
    BD: tl.constexpr = triton.next_power_of_2(D)
    BG: tl.constexpr = max(16, triton.next_power_of_2(G))
    TOKENS: tl.constexpr = BG // G
    i_b, i_group = tl.program_id(0) // num_groups, tl.program_id(0) % num_groups
    i_kv, i_s = tl.program_id(1), tl.program_id(2)
    bos, eos = tl.load(cu_seqlens + i_b), tl.load(cu_seqlens + i_b + 1)
    first = bos + i_group * TOKENS
    start = tl.load(kv_lens + i_b) - (eos - bos)  # position of the sequence's first token here
    last = start + tl.minimum(first + TOKENS, eos) - bos  # keys that the last of this block sees
    if first < eos and i_s * BS < last:
        o_row, o_d = tl.arange(0, BG), tl.arange(0, BD)
        o_t = first + o_row // G
        o_h = (o_t.to(tl.int64) - tl.load(cu_seqlens)) * HQ + i_kv * G + o_row % G
        m_row = (o_row < TOKENS * G) & (o_t < eos)
        m_q = m_row[:, None] & (o_d < D)[None, :]
        b_q = tl.load(q + o_h[:, None] * D + o_d[None, :], mask=m_q, other=0.0)  # [BG, BD]
        b_m = tl.full([BG], float("-inf"), tl.float32)
        b_l = tl.zeros([BG], tl.float32)
        b_o = tl.zeros([BG, BD], tl.float32)
        b_limit = start + o_t - bos
        p_indices = table + tl.load(rows + i_b).to(tl.int64) * table_stride
        kv_end = tl.minimum(i_s * BS + BS, last)
        for i_n in range(i_s * BS, kv_end, BN):
            b_m, b_l, b_o = attend_tile(
                b_q, b_m, b_l, b_o, p_indices, k + i_kv * D, v + i_kv * D,
                i_n + tl.arange(0, BN), b_limit,
                kv_end, pool_stride, scale, D, BD, PRECISION,
            )  # fmt: skip
        # A token that sees no key of this split leaves NaN here, which nobody reads.
        p_part = o_h * tl.num_programs(2) + i_s
        tl.store(partial_out + p_part[:, None] * D + o_d[None, :], b_o / b_l[:, None], mask=m_q)
        tl.store(partial_lse + p_part, b_m + tl.log2(b_l), mask=m_row)
        if i_s == 0 and i_kv == 0:
            tl.store(token_kv_lens + o_h // HQ, b_limit + 1, mask=m_row & (o_row % G == 0))


@triton.jit(do_not_specialize=["num_splits"])
def combine_splits_kernel(
    partial_out,
    partial_lse,
    kv_lens,
    out,
    num_splits,
    HQ: tl.constexpr,
    D: tl.constexpr,
    BS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """``out = sum_s 2^lse_s out_s / sum_s 2^lse_s``: SPLITS of them side by side, then the next.

    Where a sequence ends decides how many are added, never in which order: those past it weigh 0.
    """
    BD: tl.constexpr = triton.next_power_of_2(D)
    i_b, i_h = tl.program_id(0), tl.program_id(1)
    i_bh = i_b.to(tl.int64) * HQ + i_h
    o_d = tl.arange(0, BD)
    b_m = float("-inf")
    b_l = 0.0
    b_o = tl.zeros([BD], tl.float32)
    used = tl.cdiv(tl.load(kv_lens + i_b), BS)
    for first in tl.range(0, used, SPLITS, num_stages=COMBINE_STAGES):
        o_s = first + tl.arange(0, SPLITS)
        m_s = o_s < used
        p_part = i_bh * num_splits + o_s
        b_lse = tl.load(partial_lse + p_part, mask=m_s, other=float("-inf"))  # [SPLITS]
        p_out = p_part[:, None] * D + o_d[None, :]
        mask = m_s[:, None] & (o_d < D)[None, :]
        b_part = tl.load(partial_out + p_out, mask=mask, other=0.0)  # [SPLITS, BD]
        b_m_new = tl.maximum(b_m, tl.max(b_lse, axis=0))
        b_decay, b_weight = tl.exp2(b_m - b_m_new), tl.exp2(b_lse - b_m_new)
        b_l = b_l * b_decay + tl.sum(b_weight, axis=0)
        b_o = b_o * b_decay + tl.sum(b_part * b_weight[:, None], axis=0)
        b_m = b_m_new
    tl.store(out + i_bh * D + o_d, (b_o / b_l).to(out.dtype.element_ty), mask=o_d < D)


def prefill_attention(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    *,
    table: torch.Tensor,
    sequences: Sequences,
    packed: Packed,
    scale: float,
) -> torch.Tensor:
    """Attention of new tokens to themselves and everything before them; see
    ``reference.prefill_attention``.

    Bit-identical for a token whatever part of its sequence is computed with it, if that part starts
    at a multiple of ``packed.tile_size``.
    """
    query = query.contiguous()
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
            scale * LOG2_E,
            HQ=num_heads,
            G=group,
            D=size,
            HEADS=heads,
            TILE=packed.tile_size,
            BT=tokens,
            **tile_config(size, query.dtype),
            **launch,
        )
    return out


def decode_attention(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    *,
    table: torch.Tensor,
    sequences: Sequences,
    scale: float,
) -> torch.Tensor:
    """Attention of one token per sequence; see ``reference.decode_attention``.

    ``max(sequences.kv_lens)`` bounds the launch; the lengths that count are those in
    ``sequences.kv_len_table``.
    """
    query = query.contiguous()
    out = torch.empty_like(query)
    batch, num_heads, size = query.shape
    if batch == 0:
        return out
    num_kv_heads = key_pool.shape[1]
    num_splits = triton.cdiv(max(sequences.kv_lens), SPLIT)
    launch = {"num_warps": 4, "num_stages": pipeline_stages(DECODE_STAGES)}
    launch |= tuned(
        "attention.decode_attention_kernel", query.dtype, size, num_heads // num_kv_heads
    )
    group = group_size(num_heads, num_splits, size)
    partial_shape = (min(batch, group), num_heads, num_splits)
    partial_out = query.new_empty(*partial_shape, size, dtype=torch.float32)
    partial_lse = query.new_empty(partial_shape, dtype=torch.float32)
    for first in range(0, batch, group):
        part = slice(first, first + group)
        kv_lens = sequences.kv_len_table[part]
        decode_attention_kernel[(len(kv_lens), num_kv_heads, num_splits)](
            query[part],
            key_pool,
            value_pool,
            partial_out,
            partial_lse,
            table,
            sequences.row_table[part],
            kv_lens,
            table.stride(0),
            row_stride("a KV row", key_pool, value_pool),
            scale * LOG2_E,
            HQ=num_heads,
            G=num_heads // num_kv_heads,
            D=size,
            BS=SPLIT,
            **tile_config(size, query.dtype),
            **launch,
        )
        combine_splits_kernel[(len(kv_lens), num_heads)](
            partial_out,
            partial_lse,
            kv_lens,
            out[part],
            num_splits,
            HQ=num_heads,
            D=size,
            BS=SPLIT,
            SPLITS=COMBINED,
            num_warps=4,
        )
    return out


def verify_attention(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    *,
    table: torch.Tensor,
    sequences: Sequences,
    packed: Packed,
    scale: float,
) -> torch.Tensor:
    """Attention of a few tokens per sequence, each of which sees those before it, with the bits of
    `decode_attention`; see ``reference.verify_attention``.

    ``max(sequences.kv_lens)`` bounds the launch; the lengths that count are those in
    ``sequences.kv_len_table``.
    """
    query = query.contiguous()
    out = torch.empty_like(query)
    if not len(query):
        return out
    num_heads, size = query.shape[1:]
    num_kv_heads = key_pool.shape[1]
    group = num_heads // num_kv_heads
    num_splits, most = triton.cdiv(max(sequences.kv_lens), SPLIT), max(packed.lengths)
    launch = {"num_warps": 4, "num_stages": pipeline_stages(DECODE_STAGES)}
    launch |= tuned("attention.decode_attention_kernel", query.dtype, size, group)
    tokens_a_program = max(16, triton.next_power_of_2(group)) // group
    num_groups = triton.cdiv(most, tokens_a_program)
    starts = running_sum(packed.lengths)
    count = max(4, group_size(num_heads, num_splits, size) // most // 4 * 4)
    for begin in range(0, len(packed.lengths), count):
        part = slice(begin, min(begin + count, len(packed.lengths)))
        tokens = slice(starts[part.start], starts[part.stop])
        num_tokens = tokens.stop - tokens.start
        partial_out = query.new_empty(num_tokens, num_heads, num_splits, size, dtype=torch.float32)
        partial_lse = partial_out.new_empty(num_tokens, num_heads, num_splits)
        token_kv_lens = packed.cu_seqlens.new_empty(num_tokens)
        verify_attention_kernel[(part.stop - begin) * num_groups, num_kv_heads, num_splits](
            query[tokens],
            key_pool,
            value_pool,
            partial_out,
            partial_lse,
            token_kv_lens,
            table,
            sequences.row_table[part],
            sequences.kv_len_table[part],
            packed.cu_seqlens[part.start :],
            num_groups,
            table.stride(0),
            row_stride("a KV row", key_pool, value_pool),
            scale * LOG2_E,
            HQ=num_heads,
            G=group,
            D=size,
            BS=SPLIT,
            **tile_config(size, query.dtype),
            **launch,
        )
        combine_splits_kernel[(num_tokens, num_heads)](
            partial_out,
            partial_lse,
            token_kv_lens,
            out[tokens],
            num_splits,
            HQ=num_heads,
            D=size,
            BS=SPLIT,
            SPLITS=COMBINED,
            num_warps=4,
        )
    return out


def group_size(num_heads: int, num_splits: int, size: int) -> int:
    """Sequences whose partial outputs fit into the workspace: a multiple of 4, so that their tables
    stay aligned."""
    return max(4, WORKSPACE_BYTES // (4 * num_heads * num_splits * size) // 4 * 4)


def tile_config(size: int, dtype: torch.dtype) -> dict[str, int | str]:
    """Key tile and precision by head size and dtype: they decide the bits, so nothing else may
    choose them."""
    exact = dtype == torch.float32
    keys = (64 if size <= 128 else 32) // (2 if exact else 1)
    return {"BN": keys, "PRECISION": "ieee" if exact else "tf32"}
