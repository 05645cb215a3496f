"""Mixture of experts in Triton: routing, sorting tokens by expert, and grouped products.

A (token, choice) pair is one row of work. Rows are grouped into blocks that share an expert: sorted
by expert and padded to whole blocks, or, with few tokens, one row per block. A shared expert adds
one pair per token, after all others; its blocks come first, and need no table. Three launches
follow: ``silu(gate) * up`` of every block, the down projection, and each token's weighted sum. As
in ``kernels.linear.fused``, weights are the left operand, so a row's sums have one order in any
block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from kernels.linear import fused as linear
from kernels.linear.eight_bits import EightBits, stored_parts
from kernels.linear.formats import Matrix, QuantizedRows
from kernels.linear.fused import (
    BLOCK,
    NO_WORDS,
    add_product,
    depth_of,
    fp8_config,
    load,
    multiply_span,
    narrow,
    quantize_rows,
    scales_of,
    words_config,
)
from kernels.linear.groups import GroupFormat
from kernels.linear.reference import SCALE_BLOCK
from kernels.linear.words import Words, WordsForm, form_of, multiply_words, num_of, words_of
from kernels.moe.reference import prepare_products, quantize_experts
from kernels.moe.routing import Sorting, counts_of, launch, route, route_sigmoid
from kernels.moe.sums import NO_EXPERT, ExpertSums, Summands
from kernels.target import has_tensor_memory, pipeline_stages
from kernels.tuning import tuned

__all__ = [
    "experts",
    "experts_8bit",
    "linear",
    "prepare",
    "prepare_8bit",
    "prepare_matrices",
    "prepare_products",
    "quantize_experts",
    "route",
    "route_sigmoid",
]

JOINS_SHARED = True
"""See ``reference.JOINS_SHARED``."""

FEW_TOKENS = 16
"""Maximum number of tokens with one row per block. Few tokens rarely share experts, and sorting
would cost more than reading some experts twice."""

FEW_PAIRS = 4096
"""Maximum number of pairs that routing sorts, because one of its programs writes all of them."""

MOST_ROWS, MOST_FP8_ROWS, MOST_SCALED_ROWS = 64, 128, 32
"""Most rows per block: in full precision; in fp8, of which a multiprocessor holds twice as many;
and for weights in 4 bits with a scale for each 32 columns, whose sums need more registers."""

LEAST_NARROW = 4
"""Least number of tokens for which the first product quantises its results for the second one. Its
programs have a block of 128 outputs then; those of fewer tokens would not fill the device."""

ISSUED_ROWS = 40
"""Rows in fp8 whose products take as long as the other instructions of a loop: 167 for 16 products
of 32 columns, each of which takes half a cycle per row on Hopper."""

PART = 128
"""Pairs per ranking program, which compares each pair with each."""


class RowBlocks(NamedTuple):
    """Rows of work in blocks of BT, each with one expert."""

    pairs: torch.Tensor | None
    """int32 ``[num_blocks * BT]``: pair ``t * k + i`` of each row, ``T * k`` for padding. None if
    block b contains only pair b."""
    experts: torch.Tensor
    """int32 ``[num_blocks]``, undefined from ``count`` on."""
    count: torch.Tensor | None  # type: ignore[assignment]
    """int32 ``[1]``: number of used blocks, available on the device only. None if all are used."""
    num_blocks: int
    rows: int
    """Rows per block (BT)."""


class Sorted(NamedTuple):
    """Experts of each token, ``[T, k]``, and their pairs in blocks."""

    experts: torch.Tensor
    blocks: RowBlocks


class Stack(NamedTuple):
    """Weights of all experts ``[E, M, N]``."""

    weight: torch.Tensor | Words
    scale: torch.Tensor | None
    num_rows: int
    """M."""
    num_columns: int
    form: WordsForm | None = None
    """Of weights in words, else None."""

    @classmethod
    def of(cls, weight: torch.Tensor, scale: torch.Tensor | None = None) -> Stack:
        return cls(weight, scale, *weight.shape[1:])

    @classmethod
    def of_matrix(cls, matrix: Matrix, dtype: torch.dtype) -> Stack:
        """Return the weights in their format if there is a product for it, else in ``dtype``."""
        format, shape = matrix.format, matrix.shape[1:]
        if format.has_product(linear):
            if isinstance(format, GroupFormat):
                return cls(words_of(format, matrix.fields), None, *shape, form_of(format))
            if isinstance(format, EightBits):
                return cls.of(*stored_parts(matrix))
        return cls.of(matrix.widened(dtype))

    def config(self, rows: int) -> dict[str, Any]:
        """Return the constants of a kernel for blocks of ``rows``, if they are not the default."""
        return {} if self.form is None else words_config(self.form, self.num_columns, rows)


@triton.jit(do_not_specialize=["num_pairs"])
def rank_pairs_kernel(experts, ranks, counts, totals, num_pairs, E: tl.constexpr, BP: tl.constexpr):
    """Program i: ranks BP pairs among those of their expert, and counts the pairs per expert."""
    o_p = tl.arange(0, BP)
    o_pair = tl.program_id(0) * BP + o_p
    mask = o_pair < num_pairs
    b_e = tl.load(experts + o_pair, mask=mask, other=NO_EXPERT)  # [BP]
    b_same = b_e[:, None] == b_e[None, :]
    b_rank = tl.sum((b_same & (o_p[:, None] > o_p[None, :])).to(tl.int32), axis=1)
    b_count = tl.sum(b_same.to(tl.int32), axis=1)
    tl.store(ranks + o_pair, b_rank, mask=mask)
    is_last = (b_e != NO_EXPERT) & (b_rank == b_count - 1)
    tl.store(counts + tl.program_id(0) * E + b_e, b_count, mask=is_last)
    tl.atomic_add(totals + b_e, b_count, mask=is_last, sem="relaxed")


@triton.jit(do_not_specialize=["num_pairs", "num_parts"])
def place_experts_kernel(
    counts,
    totals,
    pairs,
    block_experts,
    block_count,
    num_pairs,
    num_parts,
    E: tl.constexpr,
    BE: tl.constexpr,
    BT: tl.constexpr,
    BP: tl.constexpr,
):
    """Program e: turns the counts of expert e, part by part, into the first rows of its pairs.

    It also stores the expert of its blocks, and pads the last block.
    """
    i_e = tl.program_id(0)
    o_e, o_p, o_t = tl.arange(0, BE), tl.arange(0, BP), tl.arange(0, BT)
    b_total = tl.load(totals + o_e, mask=o_e < E, other=0)
    b_blocks = (b_total + BT - 1) // BT  # [BE]
    first = tl.sum(tl.where(o_e < i_e, b_blocks, 0), axis=0)
    num_blocks = tl.sum(tl.where(o_e == i_e, b_blocks, 0), axis=0)
    row = first * BT
    for start in range(0, num_parts, BP):
        o_part = start + o_p
        p_count = counts + o_part * E + i_e
        b_count = tl.load(p_count, mask=o_part < num_parts, other=0)
        tl.store(p_count, row + tl.cumsum(b_count, axis=0) - b_count, mask=o_part < num_parts)
        row += tl.sum(b_count, axis=0)
    for i_block in range(first, first + num_blocks):
        tl.store(block_experts + i_block, i_e)
        o_row = i_block * BT + o_t
        tl.store(pairs + o_row, tl.zeros([BT], tl.int32) + num_pairs, mask=o_row >= row)
    if i_e == E - 1:
        tl.store(block_count, first + num_blocks)


@triton.jit(do_not_specialize=["num_pairs"])
def place_pairs_kernel(experts, ranks, rows, pairs, num_pairs, E: tl.constexpr, BP: tl.constexpr):
    """Program i: writes its BP pairs to their rows."""
    o_pair = tl.program_id(0) * BP + tl.arange(0, BP)
    b_e = tl.load(experts + o_pair, mask=o_pair < num_pairs, other=NO_EXPERT)
    mask = b_e != NO_EXPERT
    b_row = tl.load(rows + tl.program_id(0) * E + b_e, mask=mask, other=0)
    tl.store(pairs + b_row + tl.load(ranks + o_pair, mask=mask, other=0), o_pair, mask=mask)


@triton.jit
def block_rows(
    pairs, block_experts, i_block, num_pairs,
    K: tl.constexpr, BT: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Return the expert of a block, its pairs and their tokens ``[BT]``, and which of them exist.

    SHARED: number of the shared expert, or None. Its pairs follow the ``num_pairs`` of the others.
    """
    o_t = tl.arange(0, BT)
    num_shared = 0 if SHARED is None else tl.cdiv(num_pairs // K, BT)
    is_shared, i_routed = i_block < num_shared, i_block - num_shared
    if pairs is None:
        o_p = tl.where(o_t == 0, i_routed, num_pairs)
    else:
        o_p = tl.load(pairs + i_routed * BT + o_t, mask=i_routed >= 0, other=num_pairs)
    i_e = tl.load(block_experts + i_routed, mask=i_routed >= 0, other=0)
    o_token, mask = o_p // K, o_p < num_pairs
    if SHARED is not None:
        o_row = i_block * BT + o_t
        i_e = tl.where(is_shared, SHARED, i_e)
        o_p = tl.where(is_shared, num_pairs + o_row, o_p)
        o_token = tl.where(is_shared, o_row, o_token)
        mask = tl.where(is_shared, o_row < num_pairs // K, mask)
    return i_e.to(tl.int64), o_p, o_token, mask


@triton.jit
def is_unused(i_block, block_experts, block_count, num_pairs, K, BT, SHARED: tl.constexpr):
    """Return True if a block has no pairs, or one without an expert. Both are known on the device
    only."""
    i_routed = i_block - (0 if SHARED is None else tl.cdiv(num_pairs // K, BT))
    if block_count is None:
        unused = tl.load(block_experts + i_routed, mask=i_routed >= 0, other=0) == NO_EXPERT
    else:
        unused = i_routed >= tl.load(block_count)
    return unused


@triton.jit(do_not_specialize=["num_pairs"])
def gate_up_kernel(
    x,
    x_scale,
    w,
    w_scale,
    block_scale,
    inner,
    inner_scale,
    pairs,
    block_experts,
    block_count,
    num_pairs,
    size,
    x_stride,
    K: tl.constexpr,
    INNER: tl.constexpr,
    SHARED: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    FORM: tl.constexpr,
    SPANS: tl.constexpr,
    EVEN: tl.constexpr,
    GATED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Compute ``inner[p] = silu(gate) * up`` with ``(gate, up) = w[e] @ x[token of p]``.

    Gate and up rows of w are read together; w is the tables of ``Words`` if FORM is given. If not
    GATED: ``relu(w[e] @ x[token of p])^2``. Rounded to DTYPE; with ``inner_scale`` also quantised
    to fp8, for which BM is BLOCK.
    """
    i_block = tl.program_id(1)
    if is_unused(i_block, block_experts, block_count, num_pairs, K, BT, SHARED):
        return
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    i_e, o_p, o_token, m_t = block_rows(pairs, block_experts, i_block, num_pairs, K, BT, SHARED)
    m_m = o_m < INNER
    i_row, i_t = o_m, o_token
    if EVEN:  # Pointers outside of a tensor repeat others.
        i_row, i_t = tl.minimum(o_m, INNER - 1), tl.where(m_t, o_token, 0)
    p_x = x + i_t.to(tl.int64) * x_stride
    first = i_e * (2 if GATED else 1) * INNER
    if FORM is not None:
        rows: tl.constexpr = (2 if GATED else 1) * INNER
        p_gate = w.codes + (first + i_row) * num_of(size, 8, FORM)
        p_up = None
        if GATED:
            p_up = p_gate + INNER * num_of(size, 8, FORM)
        b_gate, b_up = multiply_words(
            p_x, w, p_gate, p_up, i_e, i_row, INNER + i_row, rows, 0, size, size, BM, BT, SPANS,
            FORM,
        )  # fmt: skip
    else:
        p_gate = w + (first + i_row) * size
        p_up = w + (first + INNER + i_row) * size
        p_scale, p_x_scale = block_scale, x_scale
        if x_scale is not None:
            p_x_scale += i_t * tl.cdiv(size, BLOCK)
        b_gate_scale, b_up_scale = None, None
        if w_scale is not None:
            b_gate_scale = tl.load(w_scale + first + o_m, mask=m_m, other=0.0)
            if GATED:
                b_up_scale = tl.load(w_scale + first + INNER + o_m, mask=m_m, other=0.0)
        p_up_scale = block_scale
        if block_scale is not None:
            p_scale += (first + i_row) * tl.cdiv(size, BLOCK)
            p_up_scale += (first + INNER + i_row) * tl.cdiv(size, BLOCK)
        b_gate = tl.zeros([BM, BT], tl.float32)
        b_up = tl.zeros([BM, BT], tl.float32)
        for i_k in range(0, size, BK):
            o_k, i_block = i_k + tl.arange(0, BK), i_k // BLOCK
            m_w, m_x = m_m[:, None], m_t[None, :]
            if not EVEN:
                m_w, m_x = m_w & (o_k < size)[None, :], (o_k < size)[:, None] & m_x
            b_x = load(p_x[None, :] + o_k[:, None], m_x, EVEN)
            b_x_scale = None
            if x_scale is not None:
                b_x_scale = load(p_x_scale + i_block, m_t, EVEN)
            b_w = load(p_gate[:, None] + o_k[None, :], m_w, EVEN)
            b_gate = add_product(
                b_gate, b_w, b_x, b_gate_scale, p_scale, b_x_scale, i_block, m_m, EVEN
            )
            if GATED:
                b_w = load(p_up[:, None] + o_k[None, :], m_w, EVEN)
                b_up = add_product(
                    b_up, b_w, b_x, b_up_scale, p_up_scale, b_x_scale, i_block, m_m, EVEN
                )
    # Rounded after the product, as in the reference.
    b_gate = b_gate.to(DTYPE).to(tl.float32)
    if GATED:
        b_up = b_up.to(DTYPE).to(tl.float32)
        b_inner = b_gate * tl.sigmoid(b_gate) * b_up
    else:
        b_gate = tl.maximum(b_gate, 0.0)
        b_inner = b_gate * b_gate
    p_inner = inner + o_p.to(tl.int64)[None, :] * INNER + o_m[:, None]
    if inner_scale is not None:
        b_inner, b_scale = narrow(b_inner.to(DTYPE), 0)
        p_inner_scale = inner_scale + o_p * (INNER // BLOCK) + tl.program_id(0)
        tl.store(p_inner_scale, b_scale, mask=m_t)
    tl.store(p_inner, b_inner.to(inner.dtype.element_ty), mask=m_m[:, None] & m_t[None, :])


@triton.jit(do_not_specialize=["num_pairs"])
def down_kernel(
    inner,
    inner_scale,
    w,
    w_scale,
    block_scale,
    y,
    pairs,
    block_experts,
    block_count,
    num_pairs,
    size,
    K: tl.constexpr,
    H: tl.constexpr,
    SHARED: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    FORM: tl.constexpr,
    SPANS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Compute ``y[p] = w[e] @ inner[p]``. w is as in ``gate_up_kernel``."""
    i_block = tl.program_id(1)
    if is_unused(i_block, block_experts, block_count, num_pairs, K, BT, SHARED):
        return
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    i_e, o_p, _, m_t = block_rows(pairs, block_experts, i_block, num_pairs, K, BT, SHARED)
    m_m = o_m < H
    i_row, i_p = o_m, o_p
    if EVEN:
        i_row, i_p = tl.minimum(o_m, H - 1), tl.where(m_t, o_p, 0)
    p_inner = inner + i_p.to(tl.int64) * size
    if FORM is not None:
        p_w = w.codes + (i_e * H + i_row) * num_of(size, 8, FORM)
        b_y, _ = multiply_words(
            p_inner, w, p_w, None, i_e, i_row, None, H, 0, size, size, BM, BT, SPANS, FORM
        )
    else:
        p_w = w + (i_e * H + i_row) * size
        p_channel, p_scale, p_inner_scale = w_scale, block_scale, inner_scale
        if w_scale is not None:
            p_channel += i_e * H + o_m
        if block_scale is not None:
            p_scale += (i_e * H + i_row) * tl.cdiv(size, BLOCK)
        if inner_scale is not None:
            p_inner_scale += i_p * tl.cdiv(size, BLOCK)
        b_y = multiply_span(
            p_w, p_inner, p_channel, p_scale, p_inner_scale, m_m, m_t, 0, size, BM, BT, BK,
            SPANS, EVEN,
        )  # fmt: skip
    p_y = y + o_p.to(tl.int64)[None, :] * H + o_m[:, None]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_m[:, None] & m_t[None, :])


def experts(
    hidden: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    shared_gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the weighted sum of each token's experts; see ``reference.experts``."""
    return prepare(w13, w2).sums(hidden, weights, experts, shared_gate).sum()


def experts_8bit(
    hidden: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    shared_gate: torch.Tensor | None = None,
    *,
    fp8_rows: bool = False,
) -> torch.Tensor:
    """Compute ``experts`` with 8-bit weights and their scales, per row or per block of a row.

    See ``reference.experts_8bit``.
    """
    prepared = Prepared(Stack.of(w13, w13_scale), Stack.of(w2, w2_scale), fp8_rows)
    return prepared.sums(hidden, weights, experts, shared_gate).sum()


def prepare(w13: torch.Tensor, w2: torch.Tensor) -> Prepared:
    """Return ``experts`` with these weights: (hidden, weights, experts, shared_gate=None) to ``[T,
    H]``."""
    return Prepared(Stack.of(w13), Stack.of(w2))


def prepare_8bit(
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    dtype: torch.dtype,
    *,
    fp8_rows: bool = False,
) -> Prepared:
    """Return ``experts_8bit`` with these weights, for hidden states of any dtype."""
    return Prepared(Stack.of(w13, w13_scale), Stack.of(w2, w2_scale), fp8_rows)


def prepare_matrices(
    up: Matrix, down: Matrix, dtype: torch.dtype, *, fp8_rows: bool = False
) -> Prepared:
    """Return ``experts`` with weights ``[E, M, N]`` in any formats, for hidden states of ``dtype``.

    ``fp8_rows``: as in ``prepare_8bit``, if both are in fp8.
    """
    stacks = Stack.of_matrix(up, dtype), Stack.of_matrix(down, dtype)
    return Prepared(*stacks, fp8_rows and all(stack.scale is not None for stack in stacks))


class Prepared(NamedTuple):
    """Experts with their weights."""

    w13: Stack
    w2: Stack
    fp8_rows: bool = False

    def __call__(
        self,
        hidden: torch.Tensor | QuantizedRows,
        weights: torch.Tensor,
        experts: torch.Tensor,
        shared_gate: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute ``experts``."""
        return self.sums(hidden, weights, experts, shared_gate).sum()

    def route(
        self, logits: torch.Tensor, *arguments: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | Sorted]:
        """Compute ``route``, and sort the tokens for these experts in the same launch."""
        return self._route(logits, None, *arguments, is_sigmoid=False, **options)

    def route_sigmoid(
        self, logits: torch.Tensor, *arguments: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | Sorted]:
        """Compute ``route_sigmoid``, and sort as ``route``."""
        return self._route(logits, *arguments, **options)

    def _route(
        self,
        logits: torch.Tensor,
        bias: torch.Tensor | None,
        k: int,
        *arguments: Any,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | Sorted]:
        num_tokens, num_experts = logits.shape
        if num_tokens <= FEW_TOKENS or triton.next_power_of_2(num_tokens) * k > FEW_PAIRS:
            return launch(logits, bias, k, *arguments, **options)
        blocks = empty_blocks(num_tokens, k, num_experts, self.most_rows, logits.device)
        counts, new = counts_of(num_experts, logits.device), blocks.experts.new_empty
        sorting = Sorting(counts, new(num_tokens * k), new(num_experts), *blocks[:3])
        options |= {"sorting": sorting, "rows": blocks.rows}
        weights, experts = launch(logits, bias, k, *arguments, **options)
        return weights, Sorted(experts, blocks)

    @property
    def most_rows(self) -> int:
        """Most rows per block."""
        if any(one.form is not None and one.form.group < 128 for one in (self.w13, self.w2)):
            return MOST_SCALED_ROWS
        return MOST_FP8_ROWS if self.fp8_rows else MOST_ROWS

    def sums(
        self,
        hidden: torch.Tensor | QuantizedRows,
        weights: torch.Tensor,
        experts: torch.Tensor | Sorted,
        shared_gate: torch.Tensor | None = None,
    ) -> ExpertSums:
        """Compute ``experts`` without their sum, which ``norm.rms_norm`` can add up."""
        hidden, quantized = (
            (hidden.x, hidden) if isinstance(hidden, QuantizedRows) else (hidden, None)
        )
        experts, blocks = experts if isinstance(experts, Sorted) else (experts, None)
        num_tokens, k = experts.shape
        hidden_size, inner_size = self.w2.num_rows, self.w2.num_columns
        num_experts = len(
            self.w2.weight.codes if isinstance(self.w2.weight, Words) else self.w2.weight
        )
        shared = None if shared_gate is None else num_experts - 1
        if blocks is None:
            blocks = make_blocks(experts, num_experts if shared is None else shared, self.most_rows)
        num_pairs, num_shared = num_tokens * k, 0 if shared is None else num_tokens
        num_rows = num_pairs + num_shared
        num_blocks = triton.cdiv(num_shared, blocks.rows) + blocks.num_blocks
        where = (blocks.pairs, blocks.experts, blocks.count, num_pairs)
        is_narrow = self._is_narrow(num_tokens, blocks.rows)
        same = {"K": k, "SHARED": shared, "BT": blocks.rows}
        up = same | self._tile(self.w13, hidden.dtype, blocks.rows, is_narrow=is_narrow)
        down = same | self._tile(self.w2, hidden.dtype, blocks.rows)
        x, x_scale, inner_scale = hidden, None, None
        if self.fp8_rows:
            x, x_scale = (
                quantize_rows(hidden) if quantized is None else (quantized.rows, quantized.scale)
            )
        inner = hidden.new_empty(num_rows, inner_size)
        results = hidden.new_empty(num_rows, hidden_size)
        if is_narrow:
            inner = hidden.new_empty(num_rows, inner_size, dtype=torch.float8_e4m3fn)
            num_scales = inner_size // SCALE_BLOCK
            inner_scale = hidden.new_empty(num_rows, num_scales, dtype=torch.float32)
        gate_up_kernel[(triton.cdiv(inner_size, up["BM"]), num_blocks)](
            x,
            x_scale,
            self.w13.weight,
            *scales_of(self.w13.weight, self.w13.scale),
            inner,
            inner_scale,
            *where,
            self.w13.num_columns,
            x.stride(0),
            INNER=inner_size,
            GATED=self.w13.num_rows == 2 * inner_size,
            DTYPE=getattr(tl, str(hidden.dtype).removeprefix("torch.")),
            **up,
        )
        if self.fp8_rows and not is_narrow:
            inner, inner_scale = quantize_rows(inner)
        down_kernel[(triton.cdiv(hidden_size, down["BM"]), num_blocks)](
            inner,
            inner_scale,
            self.w2.weight,
            *scales_of(self.w2.weight, self.w2.scale),
            results,
            *where,
            inner_size,
            H=hidden_size,
            **down,
        )
        gate_stride = 0 if shared_gate is None else shared_gate.stride(0)
        summands = Summands(results, weights, experts, shared_gate, gate_stride)
        return ExpertSums(summands, num_tokens, num_tokens)

    def _is_narrow(self, num_tokens: int, num_rows: int) -> bool:
        """Return True if the first product writes its rows in fp8, with scales by block."""
        fits = self.w2.num_columns % SCALE_BLOCK == 0 and num_rows <= MOST_ROWS
        return self.fp8_rows and fits and num_tokens >= LEAST_NARROW

    def _tile(
        self, stack: Stack, dtype: torch.dtype, num_rows: int, *, is_narrow: bool = False
    ) -> dict[str, Any]:
        """Return the launch parameters of a product with blocks of ``num_rows``."""
        is_first = stack is self.w13
        tile: dict[str, Any] = {"BM": 64, "num_stages": pipeline_stages(4), **NO_WORDS}
        if self.fp8_rows:
            tile["num_warps"] = 8 if num_rows > MOST_ROWS else 4
        tile |= stack.config(num_rows)
        if is_first and tile["SPANS"] == 2 and num_rows > 32 and has_tensor_memory():
            tile["SPANS"] = 1  # Triton 3.7 compiles gate and up in two spans to nothing.
        tile["BK"] = _depth(dtype, stack)
        if self.fp8_rows:
            is_large = is_first or num_rows > MOST_ROWS
            tile |= fp8_config(stack.num_columns, num_rows, is_large=is_large)
        elif stack.form is None and (stack.scale is None or stack.scale.ndim == 2):
            assert isinstance(stack.weight, torch.Tensor)
            num_outputs = self.w2.num_columns if is_first else self.w2.num_rows
            name = "moe.gate_up_kernel" if is_first else "moe.down_kernel"
            key = dtype, stack.weight.dtype, num_outputs, stack.num_columns, num_rows
            tile |= tuned(name, *key)
        if is_narrow:
            tile |= {"BM": SCALE_BLOCK, "num_warps": 8 if num_rows > 32 else 4}
            tile |= {"num_stages": pipeline_stages(3)}
        return tile


def _depth(dtype: torch.dtype, stack: Stack) -> int:
    return depth_of(dtype, torch.int8 if isinstance(stack.weight, Words) else stack.weight.dtype)


def empty_blocks(
    num_tokens: int, k: int, num_experts: int, most_rows: int, device: torch.device
) -> RowBlocks:
    """Allocate the blocks of T tokens with k experts, of more than ``FEW_TOKENS``."""
    # By powers of two of tokens: one step in each range compiles all kernels of that range.
    most_pairs, num_pairs = triton.next_power_of_2(num_tokens) * k, num_tokens * k
    rows = rows_per_block(triton.cdiv(most_pairs, num_experts), most_rows)
    num_blocks = num_pairs // rows + min(num_experts, num_pairs)
    sizes = num_blocks * rows, num_blocks, 1
    pairs, experts, count = (torch.empty(n, dtype=torch.int32, device=device) for n in sizes)
    return RowBlocks(pairs, experts, count, num_blocks, rows)


def make_blocks(experts: torch.Tensor, num_experts: int, most_rows: int = MOST_ROWS) -> RowBlocks:
    """Build the blocks for ``experts [T, k]``, in the order of tokens within an expert.

    Values stay on the device.
    """
    num_tokens, k = experts.shape
    num_pairs = num_tokens * k
    if num_tokens <= FEW_TOKENS:
        return RowBlocks(None, experts.reshape(-1), None, num_pairs, 16)
    blocks = empty_blocks(num_tokens, k, num_experts, most_rows, experts.device)
    _sort_by_parts(experts, blocks, num_experts)
    return blocks


def rows_per_block(mean: int, most_rows: int) -> int:
    """Return the size of blocks for experts with ``mean`` rows.

    The smallest power of two that holds them, up to ``most_rows``. In fp8 it is the one that takes
    the least time with its padding: tensor cores are fast enough that a block of fewer than
    ``ISSUED_ROWS`` rows takes the time of its other instructions.
    """
    if most_rows < MOST_FP8_ROWS:
        return min(most_rows, max(16, triton.next_power_of_2(mean)))

    def cost(rows: int) -> tuple[int, int]:
        num_blocks = triton.cdiv(mean, rows)
        return num_blocks * max(rows, ISSUED_ROWS), num_blocks

    return min((16, 32, 64, 128), key=cost)


def _sort_by_parts(experts: torch.Tensor, blocks: RowBlocks, num_experts: int) -> None:
    """Fill ``blocks`` with a counting sort: each pair is read twice, and compared with the pairs of
    its part."""
    num_pairs = experts.numel()
    num_parts = triton.cdiv(num_pairs, PART)
    tables = torch.zeros(num_parts + 1, num_experts, dtype=torch.int32, device=experts.device)
    counts, totals = tables[1:], tables[0]
    ranks = torch.empty(num_pairs, dtype=torch.int32, device=experts.device)
    sizes = {"E": num_experts, "BP": PART}
    rank_pairs_kernel[(num_parts,)](experts, ranks, counts, totals, num_pairs, num_warps=8, **sizes)
    place_experts_kernel[(num_experts,)](
        counts,
        totals,
        blocks.pairs,
        blocks.experts,
        blocks.count,
        num_pairs,
        num_parts,
        BE=triton.next_power_of_2(num_experts),
        BT=blocks.rows,
        **sizes,
    )
    place_pairs_kernel[(num_parts,)](experts, ranks, counts, blocks.pairs, num_pairs, **sizes)
