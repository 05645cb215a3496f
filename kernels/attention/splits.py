"""Combination of partial attention outputs, one per split of the keys: 32 in parallel, then the
next 32."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

SPLIT = 256
"""Keys per decode program. Partial outputs are float32: 1/64 of the KV traffic per query head of a
KV head."""

LEAST_WORKSPACE_BYTES = 2**26
WORKSPACE_SHARE = 256
"""Memory of the device per byte of the partial outputs. For 64 sequences of 128k tokens and 16
heads of 256 they take half a GiB, as much as a device with 128 GiB allows."""

COMBINED = 32
"""Splits combined in parallel: 128k tokens take 16 iterations instead of 512."""
COMBINE_STAGES = tl.constexpr(2)


@triton.jit(do_not_specialize=["num_splits"])
def combine_splits_kernel(
    partial_out,
    partial_lse,
    kv_lens,
    gate,
    out,
    num_splits,
    gate_stride,
    HQ: tl.constexpr,
    D: tl.constexpr,
    BS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Compute ``out = sum_s 2^lse_s out_s / sum_s 2^lse_s``, SPLITS at a time.

    The end of a sequence determines the number of splits but not their order; later ones weigh 0.
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
    b_o = (b_o / b_l).to(out.dtype.element_ty)
    if gate is not None:  # After rounding, as `activation.sigmoid_mul`.
        p_gate = gate + i_b.to(tl.int64) * gate_stride + i_h * D + o_d
        b_gate = tl.load(p_gate, mask=o_d < D, other=0.0).to(tl.float32)
        b_o = (b_o.to(tl.float32) * tl.sigmoid(b_gate)).to(out.dtype.element_ty)
    tl.store(out + i_bh * D + o_d, b_o, mask=o_d < D)


PROGRAMS = 1024
"""Programs of a launch that share all splits of its sequences: two to three for each place of an
H100. A long sequence costs no program for the short ones."""
SEQUENCES = tl.constexpr(128)
"""Sequences whose splits are counted at once."""


def num_programs(num_splits: int, per_split: int) -> int:
    """Return the number of programs that walk over at most ``num_splits`` splits, of which each
    takes ``per_split``. Does not change results."""
    return min(num_splits, triton.cdiv(PROGRAMS, per_split))


@triton.jit
def splits_of(kv_lens, cu_seqlens, o_b, num_sequences, BS: tl.constexpr, TOKENS: tl.constexpr):
    """Return the number of splits of BS keys of sequences ``o_b``, for each TOKENS tokens of
    ``cu_seqlens`` if that is given."""
    mask = o_b < num_sequences
    b_count = tl.cdiv(tl.load(kv_lens + o_b, mask=mask, other=0), BS)
    if cu_seqlens is not None:
        b_tokens = tl.load(cu_seqlens + o_b + 1, mask=mask, other=0)
        b_tokens -= tl.load(cu_seqlens + o_b, mask=mask, other=0)
        b_count *= tl.cdiv(b_tokens, TOKENS)
    return b_count


@triton.jit
def count_splits(kv_lens, cu_seqlens, num_sequences, BS: tl.constexpr, TOKENS: tl.constexpr):
    """Return the number of splits of all sequences."""
    total = 0
    for first in range(0, num_sequences, SEQUENCES):
        o_b = first + tl.arange(0, SEQUENCES)
        b_count = splits_of(kv_lens, cu_seqlens, o_b, num_sequences, BS, TOKENS)
        total += tl.sum(b_count, axis=0)
    return total


@triton.jit
def find_split(i, kv_lens, cu_seqlens, num_sequences, BS: tl.constexpr, TOKENS: tl.constexpr):
    """Return the sequence of split i of all sequences, and its number in the sequence."""
    i_b, before, total = 0, 0, 0
    for first in range(0, num_sequences, SEQUENCES):
        o_b = first + tl.arange(0, SEQUENCES)
        b_count = splits_of(kv_lens, cu_seqlens, o_b, num_sequences, BS, TOKENS)
        is_before = (total + tl.cumsum(b_count, axis=0) <= i) & (o_b < num_sequences)
        i_b += tl.sum(is_before.to(tl.int32), axis=0)
        before += tl.sum(tl.where(is_before, b_count, 0), axis=0)
        total += tl.sum(b_count, axis=0)
    return i_b, i - before


@cache
def workspace_bytes() -> int:
    """Return the maximum size of the partial outputs. Sequences that exceed it are decoded in
    several groups, with equal bits."""
    if not torch.accelerator.is_available():
        return LEAST_WORKSPACE_BYTES
    properties = torch.get_device_module().get_device_properties()
    return max(LEAST_WORKSPACE_BYTES, properties.total_memory // WORKSPACE_SHARE)


def group_size(num_heads: int, num_splits: int, size: int) -> int:
    """Return the number of tokens with partial outputs that fit into the workspace.

    A multiple of 4, so that the tables of a group stay aligned.
    """
    return max(4, workspace_bytes() // (4 * num_heads * num_splits * size) // 4 * 4)


def is_one_chunk(num_tokens: int, kv_len: int, num_heads: int, size: int) -> bool:
    """Return True if `verify_attention` launches ``num_tokens`` tokens with ``kv_len`` keys at
    once.

    The host's lengths of the sequences are then only bounds.
    """
    return num_tokens <= group_size(num_heads, triton.cdiv(kv_len, SPLIT), size)
