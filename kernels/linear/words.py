"""Weights of 4 bits on a device: their order in 32-bit words, and products that widen them.

A row is divided into spans of 128 columns, of 16 words each. Field ``i + 4 * h`` of word ``j``
(bits from ``4 * (i + 4 * h)`` on) has column ``32 * i + 2 * j + h`` of the span. So
``word >> 4 * i`` has two neighbouring columns at bits 0 and 16: the two halves of a register that
feeds a tensor core, after one shift, two operations on bits and one subtraction. The columns of
each ``i`` are a product of depth 32.

Codes are widened to bfloat16, which is exact, and the sum of a group's products is multiplied by
the group's scale in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.linear.blocks import E2M1
from kernels.linear.groups import GroupFormat, widened_scale

SPAN = 128
"""Columns of a span."""
DEPTH = tl.constexpr(32)
"""Columns per product: a quarter of a span."""
WORDS = tl.constexpr(16)
"""Words of a span."""
E2M1_FACTOR = tl.constexpr(2.0**127)
"""Value of the bits of an e2m1 number in those of a bfloat16, to that of ``blocks.E2M1``."""


class Words(NamedTuple):
    """Tables of a matrix ``[..., M, N]``, passed to kernels as one argument."""

    codes: torch.Tensor
    """int32 ``[..., M, 16 * spans]``."""
    scale: torch.Tensor
    """float16, bfloat16 or float32 ``[..., blocks, M]``, of whole spans."""
    factors: torch.Tensor | None
    """int8 ``[..., groups, M]``; as ``groups.Groups``, as are the others."""
    minimum: torch.Tensor | None
    """float16 ``[..., blocks, M]``."""
    minima: torch.Tensor | None
    """uint8 ``[..., groups, M]``."""
    zeros: torch.Tensor | None
    """uint8 ``[..., blocks, M]``."""


class WordsForm(NamedTuple):
    """Constants of a format, for the compiler."""

    group: int
    block: int
    zero: int
    is_e2m1: bool


def has_words(format: GroupFormat) -> bool:
    """Return True if matrices of this format can be brought into words."""
    is_known = format.table is None or format.table == E2M1
    return format.bits == 4 and format.group in (32, 64, SPAN) and is_known


def form_of(format: GroupFormat) -> WordsForm:
    return WordsForm(format.group, format.block, format.zero, format.table is not None)


def words_of(format: GroupFormat, fields: Mapping[str, torch.Tensor]) -> Words:
    """Bring a matrix ``[..., M, N]``, for which ``has_words`` is True, into words, without a change
    of a number. One matrix of a stack at a time, so that unpacked codes are few."""
    first = next(iter(fields.values()))
    if first.ndim > 2:
        parts = [
            words_of(format, {name: tensor[index] for name, tensor in fields.items()})
            for index in range(len(first))
        ]
        tables = zip(*parts, strict=True)
        return Words(*(None if table[0] is None else torch.stack(table) for table in tables))
    found = format.decoded(fields)
    codes = F.pad(found.codes, (0, -found.codes.shape[-1] % SPAN))
    fields_of_words = codes.unflatten(-1, (-1, 2, 2, SPAN // 8, 2))
    # Dimensions of a span: upper and lower bit of i, j, h. Bytes of a word: h, then the upper bit.
    low, high = fields_of_words.permute(0, 1, 4, 5, 2, 3).unbind(-1)
    data = (low | high << 4).flatten(-2).contiguous()
    words = data.view(torch.int32).flatten(1)
    scale = found.scale
    if scale.dtype is torch.uint8:  # A power of two is exact in bfloat16.
        scale = widened_scale(scale).bfloat16()

    def by_columns(table: torch.Tensor | None, columns: int) -> torch.Tensor | None:
        """Return a table with a row per group or block, of whole spans."""
        if table is None:
            return None
        return F.pad(table, (0, -table.shape[1] % max(1, SPAN // columns))).t().contiguous()

    return Words(
        words,
        by_columns(scale, format.block),
        by_columns(found.factors, format.group),
        by_columns(found.minimum, format.block),
        by_columns(found.minima, format.group),
        by_columns(found.zeros, format.block),
    )


@triton.jit
def num_of(N, COLUMNS: tl.constexpr, FORM: tl.constexpr):
    """Return the number of parts of COLUMNS columns in a row of N columns, up to whole spans and
    blocks. A word has 8 columns."""
    WHOLE: tl.constexpr = FORM[1] if FORM[1] > 4 * DEPTH else 4 * DEPTH
    return tl.cdiv(N, WHOLE) * (WHOLE // COLUMNS)


@triton.jit
def widen(b_words, b_zero, PART: tl.constexpr, FORM: tl.constexpr):
    """Return the numbers ``[BM, DEPTH]`` of the fields PART and PART + 4 in bfloat16:
    ``code - zero``, or e2m1 numbers times 2."""
    if FORM[3]:
        # Sign and magnitude to the sign, and to the lowest bits of the exponent and the highest of
        # the mantissa.
        if PART < 2:
            b_size = (b_words << (6 - 4 * PART)) & 0x01C001C0
        else:
            b_size = (b_words >> (4 * PART - 6)) & 0x01C001C0
        b_pairs = ((b_words << (12 - 4 * PART)) & -0x7FFF8000) | b_size
    else:
        # 0x4300 is 128, whose last bit has the value 1.
        b_pairs = ((b_words >> (4 * PART)) & 0x000F000F) | 0x43004300
    b_low, b_high = (b_pairs & 0xFFFF).to(tl.int16), (b_pairs >> 16).to(tl.int16)
    b_both = tl.join(b_low, b_high).reshape(b_words.shape[0], DEPTH)
    b_both = b_both.to(tl.bfloat16, bitcast=True)
    if FORM[3]:
        b_both = b_both * E2M1_FACTOR
    elif b_zero is not None:
        b_both = b_both - b_zero[:, None]
    else:
        b_both = b_both - (128 + FORM[2])
    return b_both


@triton.jit
def block_of(table, i_e, i_row, stride, i_k, N, FORM: tl.constexpr):
    """Return scales and minima of the rows in the block of column i_k, and 128 plus their zeros,
    each ``[BM]``, or None if the format has none."""
    i_block = (i_e * num_of(N, FORM[1], FORM) + i_k // FORM[1]) * stride + i_row
    b_scale = tl.load(table.scale + i_block).to(tl.float32)
    b_low, b_zero = None, None
    if table.minimum is not None:
        b_low = tl.load(table.minimum + i_block).to(tl.float32)
    if table.zeros is not None:
        b_zero = (tl.load(table.zeros + i_block).to(tl.float32) + 128.0).to(tl.bfloat16)
    return b_scale, b_low, b_zero


@triton.jit
def add_part(
    b_y, b_sum, b_x_sum, b_words, b_x, b_ones, block, table, i_e, i_row, stride, i_k, N,
    PART: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Add the product of one PART of a span, whose first column is i_k. Returns the sum of all
    groups, and those of the products and of x in a group that has not ended.

    The tables have ``stride`` rows per group; ``i_row`` are those of this tile.
    """
    b_w = widen(b_words, block[2], PART, FORM).to(b_x.dtype)
    b_sum = tl.dot(b_w, b_x, b_sum, input_precision="ieee")
    if b_ones is not None:
        b_x_sum = tl.dot(b_ones, b_x, b_x_sum, input_precision="ieee")
    if (PART + 1) * DEPTH % FORM[0] == 0:
        i_group = (i_e * num_of(N, FORM[0], FORM) + i_k // FORM[0]) * stride + i_row
        b_scale = block[0]
        if table.factors is not None:
            b_scale *= tl.load(table.factors + i_group).to(tl.float32)
        b_y += b_sum * b_scale[:, None]
        b_sum = tl.zeros_like(b_sum)
        if b_ones is not None:
            b_low = block[1]
            if table.minima is not None:
                b_low *= tl.load(table.minima + i_group).to(tl.float32)
            b_y -= b_x_sum * b_low[:, None]
            b_x_sum = tl.zeros_like(b_x_sum)
    return b_y, b_sum, b_x_sum


@triton.jit
def multiply_words(
    p_x, table, p_words, p_other, i_e, i_row, i_other, stride, start, end, N,
    BM: tl.constexpr, BT: tl.constexpr, SPANS: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Compute ``w[:, start:end] @ x[:, start:end].T`` in float32, ``[BM, BT]``, and the same for
    the rows ``i_other`` of w, or None.

    Pointers and rows exist for all of a tile: those outside of the matrix repeat the last one.

    Args:
        p_x: to the rows of x ``[BT]``; p_words, p_other: to rows of words ``[BM]``.
        i_e: number of the matrix in a stack, of which each has ``stride`` rows.
        start: a multiple of a span; end: another, or N.
        SPANS: spans per turn. More than one only if all have whole turns.
    """
    b_y, b_z = tl.zeros([BM, BT], tl.float32), tl.zeros([BM, BT], tl.float32)
    o_j, o_n = tl.arange(0, WORDS), tl.arange(0, DEPTH)
    b_ones = None
    if table.minimum is not None:  # From a number that the compiler does not know: kept, not made.
        b_ones = (o_n < N)[None, :].to(tl.float32).to(p_x.dtype.element_ty)
        b_ones = tl.broadcast_to(b_ones, [BM, DEPTH])
    for i_start in range(start, end, SPANS * 4 * DEPTH):
        for s in tl.static_range(SPANS):
            i_span = i_start + s * 4 * DEPTH
            o_word = i_span // 8 + o_j
            b_words = tl.load(p_words[:, None] + o_word[None, :])
            if p_other is not None:
                b_others = tl.load(p_other[:, None] + o_word[None, :])
            b_sum, b_x_sum = tl.zeros([BM, BT], tl.float32), tl.zeros([BM, BT], tl.float32)
            b_other_sum, b_again = tl.zeros([BM, BT], tl.float32), tl.zeros([BM, BT], tl.float32)
            for i in tl.static_range(4):
                i_k = i_span + i * DEPTH
                p_part = p_x[None, :] + (i_k + o_n)[:, None]
                if SPANS > 1:
                    b_x = tl.load(p_part)
                else:
                    b_x = tl.load(p_part, mask=(i_k + o_n < N)[:, None], other=0.0)
                if i * DEPTH % FORM[1] == 0:
                    block = block_of(table, i_e, i_row, stride, i_k, N, FORM)
                    if p_other is not None:
                        other = block_of(table, i_e, i_other, stride, i_k, N, FORM)
                b_y, b_sum, b_x_sum = add_part(
                    b_y, b_sum, b_x_sum, b_words, b_x, b_ones, block, table, i_e, i_row,
                    stride, i_k, N, i, FORM,
                )  # fmt: skip
                if p_other is not None:
                    b_z, b_other_sum, b_again = add_part(
                        b_z, b_other_sum, b_again, b_others, b_x, b_ones, other, table, i_e,
                        i_other, stride, i_k, N, i, FORM,
                    )  # fmt: skip
    return b_y, b_z
