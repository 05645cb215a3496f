"""Causal grouped-query attention of new tokens over a KV pool in Triton.

A program takes a tile of query tokens (64; 32 in float32) and up to two heads of one KV head. It
walks the keys from position 0 in tiles of BN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.activation.fused import sigmoid_mul
from kernels.attention.sequences import Sequences
from kernels.attention.tile import LOG2_E, attend_tile, keys_per_tile
from kernels.packed import Packed
from kernels.strides import row_stride
from kernels.target import has_roomy_memory, pipeline_stages
from kernels.tuning import tuned

# Loads with loaded addresses take two stages of the pipeline for the addresses.
PREFILL_STAGES = 4


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
    table: torch.Tensor,
    sequences: Sequences,
    packed: Packed,
    scale: float,
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute attention of new tokens to themselves and to all earlier tokens.

    See ``reference.prefill_attention``. A token has equal bits for every chunk of its sequence that
    starts at a multiple of ``packed.tile_size``.
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
            BN=keys_per_tile(size, query.dtype),
            **launch,
        )
    # Not in the kernel, which would spill registers on an H100.
    return out if gate is None else sigmoid_mul(out.flatten(1), gate).view_as(out)
