"""Linear layers in Triton, in full precision and 8-bit, with rows independent of the batch.

Weights are the left operand: a program computes ``y.T[BM, BT] = w[BM, N] @ x.T[N, BT]``. With few
tokens only the narrow side of the tile shrinks. The tensor cores compute the same products in the
same order, and 8-bit weights are widened in the registers that feed them.

The sum over N is divided into spans that depend only on the weight's shape. With few tokens, each
span has separate programs, and the last of them to end adds the spans. With many tokens, one
program adds span after span. The additions and their order are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.linear import reference
from kernels.linear.formats import QuantizedRows
from kernels.linear.groups import GroupFormat
from kernels.linear.reference import SCALE_BLOCK, STORAGE, Format, look_up, quantize
from kernels.linear.words import (
    SPAN,
    Words,
    WordsForm,
    form_of,
    has_words,
    multiply_words,
    num_of,
    words_of,
)
from kernels.target import has_roomy_memory, has_tensor_memory, pipeline_stages
from kernels.tuning import token_class, tuned

ROWS = 4
"""Rows per padding unit, as ``reference.ROWS``."""

__all__ = [
    "ROWS",
    "has_groups",
    "join",
    "linear",
    "linear_8bit",
    "linear_fp8",
    "look_up",
    "prepare",
    "prepare_8bit",
    "prepare_groups",
    "quantize",
    "quantize_rows",
]

PRODUCTS: frozenset[tuple[Format, int | None]] = frozenset(
    {("int8", None), ("fp8", None), ("fp8", SCALE_BLOCK)}
)
"""Formats as in ``reference.PRODUCTS``."""
FEW_TOKENS = 64
"""Maximum number of tokens for which spans are computed in parallel."""
PROGRAMS = 256
"""Number of programs up to which spans are divided with few tokens: two for each multiprocessor of
an H100."""
LEAST_SPAN = 512
LEAST_ROWS, LEAST_TOKENS = 64, 16
"""Smallest tile: rows of a weight, and tokens."""
MOST_GATES = 512
"""Most outputs of a product that shares a launch with a larger one."""
BLOCK = tl.constexpr(SCALE_BLOCK)
LEAST_LARGEST = tl.constexpr(reference.LEAST_LARGEST)
FP8_INVERSE = tl.constexpr(1.0 / STORAGE["fp8"][1])


@triton.jit
def narrow(b_x, AXIS: tl.constexpr):
    """Quantise a tile to fp8, with one scale along AXIS, as ``reference.quantize_rows``."""
    b_x = b_x.to(tl.float32)
    b_scale = tl.maximum(tl.max(tl.abs(b_x), axis=AXIS), LEAST_LARGEST) * FP8_INVERSE
    return tl.div_rn(b_x, tl.expand_dims(b_scale, AXIS)).to(tl.float8e4nv), b_scale


@triton.jit
def quantize_rows_kernel(x, rows, scales, N, x_stride, BLOCKS: tl.constexpr):
    """Program (i_t, i): quantises BLOCKS blocks of row i_t."""
    i_t, num_blocks = tl.program_id(0).to(tl.int64), tl.cdiv(N, BLOCK)
    o_b = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    o_n = o_b[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    b_x, b_scale = narrow(tl.load(x + i_t * x_stride + o_n, mask=o_n < N, other=0.0), 1)
    tl.store(rows + i_t * N + o_n, b_x, mask=o_n < N)
    tl.store(scales + i_t * num_blocks + o_b, b_scale, mask=o_b < num_blocks)


@triton.jit
def load(pointers, mask, EVEN: tl.constexpr):
    """Load numbers, or zeros where ``mask`` is False. If EVEN, all pointers are valid."""
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def add_product(b_y, b_w, b_x, b_scale, p_scale, b_x_scale, i_block, m_m, EVEN: tl.constexpr):
    """Add ``w @ x`` for columns of w in block i_block to a tile ``[BM, BT]``.

    Scales of w's rows are in ``b_scale``, or loaded from ``p_scale``, or None; ``b_x_scale`` are
    those of x, or None.
    """
    if b_scale is None and p_scale is None:
        b_y = tl.dot(b_w, b_x, b_y, input_precision="ieee")
    else:
        b_factor = load(p_scale + i_block, m_m, EVEN) if p_scale is not None else b_scale
        # The tensor cores of Hopper read widened weights from registers while the program runs on.
        # The scale keeps the product apart from the sum, so it is waited for before the next
        # weights overwrite them (tests/kernels/machine_code.py).
        if b_w.dtype.is_fp8() and not b_x.dtype.is_fp8():
            b_w = b_w.to(tl.float32)  # Hopper converts slowly without this step.
        b_product = tl.dot(b_w.to(b_x.dtype), b_x, input_precision="ieee")
        if b_x_scale is not None:
            b_product *= b_x_scale[None, :]
        b_y += b_product * b_factor[:, None]
    return b_y


@triton.jit
def multiply_span(
    p_w, p_x, scale, p_scale, p_x_scale, m_m, m_t, start, end,
    BM: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, SPANS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Compute ``w[:, start:end] @ x[:, start:end].T`` in float32, ``[BM, BT]``, from row pointers.

    ``scale``: pointers to the scales of w's rows, or None. ``p_scale``: pointers to rows of scales,
    one scale per BLOCK elements, or None. ``p_x_scale``: the same of x. Both require that BK is
    BLOCK. SPANS: number of BK per turn. EVEN: True if there are only whole turns, and all pointers
    are valid: loads have no masks.
    """
    b_y = tl.zeros([BM, BT], tl.float32)
    b_scale = None
    if scale is not None:
        b_scale = tl.load(scale, mask=m_m, other=0.0)
    for i_start in range(start, end, SPANS * BK):
        for s in tl.static_range(SPANS):
            o_k, i_block = i_start + s * BK + tl.arange(0, BK), i_start // BLOCK + s
            m_w, m_x = m_m[:, None], m_t[None, :]
            if not EVEN:
                m_w, m_x = m_w & (o_k < end)[None, :], (o_k < end)[:, None] & m_x
            b_w = load(p_w[:, None] + o_k[None, :], m_w, EVEN)
            b_x = load(p_x[None, :] + o_k[:, None], m_x, EVEN)
            b_x_scale = None
            if p_x_scale is not None:
                b_x_scale = load(p_x_scale + i_block, m_t, EVEN)
            b_y = add_product(b_y, b_w, b_x, b_scale, p_scale, b_x_scale, i_block, m_m, EVEN)
    return b_y


@triton.jit
def store_tile(b_y, bias, y, o_m, o_t, M, y_stride, mask):
    """Store ``y[t, m] = b_y[m, t] + bias[m]`` for a tile ``[BM, BT]``."""
    if bias is not None:
        b_y += tl.load(bias + o_m, mask=o_m < M, other=0.0).to(tl.float32)[:, None]
    p_y = y + o_t.to(tl.int64)[None, :] * y_stride + o_m[:, None]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=mask)


@triton.jit
def add_spans(b_span, p_span, stride, num_spans, counter, mask):
    """Add the spans ``[BM, BT]`` of one tile, each computed by another program.

    The last program that arrives adds all of them in their order, so the result does not depend on
    which one it is. Returns (sum, True) for that program, and a value without meaning and False
    for the others. The counter is zero before and after.
    """
    tl.store(p_span + tl.program_id(2) * stride, b_span, mask=mask)
    # All threads have stored before one of them publishes the stores with an addition that
    # releases them, and acquires those of the other programs.
    tl.debug_barrier()
    is_last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == num_spans - 1
    b_total = tl.zeros_like(b_span)
    if is_last:
        for i_s in range(num_spans):
            # Not from the cache of one multiprocessor, which other programs do not write.
            b_total += tl.load(p_span + i_s * stride, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(counter, 0)
    return b_total, is_last


@triton.jit
def compute_tile(
    x, x_scale, w, scale, block_scale, bias, y, spans, counter, first_row, num_tokens, M, N, span,
    x_stride, y_stride, BM: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    FORM: tl.constexpr, SPANS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Compute a tile of ``y = x @ w.T + bias`` from row ``first_row`` of w on, or the span of this
    program if ``spans`` is given. w is the tables of ``words.Words`` if FORM is given."""
    o_m = first_row + tl.arange(0, BM)
    o_t = tl.program_id(1) * BT + tl.arange(0, BT)
    m_m, m_t = o_m < M, o_t < num_tokens
    mask = m_m[:, None] & m_t[None, :]
    i_row, i_t = o_m, o_t
    if EVEN:  # Pointers outside of a tensor repeat the last one.
        i_row, i_t = tl.minimum(o_m, M - 1), tl.minimum(o_t, num_tokens - 1)
    if FORM is None:
        p_w = w + i_row.to(tl.int64) * N
    else:
        p_w = w.codes + i_row.to(tl.int64) * num_of(N, 8, FORM)
    p_x = x + i_t.to(tl.int64) * x_stride
    p_channel, p_scale = scale, block_scale
    if scale is not None:
        p_channel += o_m
    if block_scale is not None:
        p_scale += i_row * tl.cdiv(N, BLOCK)
    p_x_scale = x_scale
    if x_scale is not None:
        p_x_scale += i_t * tl.cdiv(N, BLOCK)
    own = tl.program_id(2) * span
    first, last = (0, N) if spans is None else (own, tl.minimum(own + span, N))
    b_total = tl.zeros([BM, BT], tl.float32)
    # Used for one span too: on Hopper, storing a product's own accumulator would make the products
    # wait for each other.
    for start in range(first, last, span):
        end = tl.minimum(start + span, N)
        if FORM is None:
            b_total += multiply_span(
                p_w, p_x, p_channel, p_scale, p_x_scale, m_m, m_t, start, end,
                BM, BT, BK, SPANS, EVEN,
            )  # fmt: skip
        else:
            b_span, _ = multiply_words(
                p_x, w, p_w, None, 0, i_row, None, M, start, end, N, BM, BT, SPANS, FORM
            )
            b_total += b_span
    is_last = True
    if spans is not None:
        p_span = spans + o_t[None, :] * y_stride + o_m[:, None]
        num_spans, stride = tl.cdiv(N, span), num_tokens * y_stride
        is_last = num_spans == 1
        if num_spans > 1:
            b_total, is_last = add_spans(b_total, p_span, stride, num_spans, counter, mask)
    if is_last:
        store_tile(b_total, bias, y, o_m, o_t, M, y_stride, mask)


@triton.jit(do_not_specialize=["num_tokens"])
def linear_kernel(
    x,
    x_scale,
    w,
    scale,
    block_scale,
    bias,
    y,
    spans,
    counters,
    num_tokens,
    M,
    N,
    span,
    x_stride,
    BM: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    FORM: tl.constexpr,
    SPANS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Program (i_m, i_t, i_s): computes a tile of ``y``, or its span i_s if ``spans`` is given."""
    counter = counters
    if spans is not None:
        counter += tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    compute_tile(
        x, x_scale, w, scale, block_scale, bias, y, spans, counter, tl.program_id(0) * BM,
        num_tokens, M, N, span, x_stride, M, BM, BT, BK, FORM, SPANS, EVEN,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def joined_kernel(
    x,
    rows,
    x_scale,
    w,
    scale,
    block_scale,
    gates_w,
    y,
    spans,
    counters,
    num_tokens,
    M,
    GATES_M,
    N,
    span,
    gates_span,
    x_stride,
    rows_stride,
    BM: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    GATES_BK: tl.constexpr,
    FORM: tl.constexpr,
    SPANS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Compute ``[rows @ w.T | x @ gates_w.T]``, as ``linear_kernel`` computes each part. ``rows``
    is x, perhaps quantised.

    The gates have few rows, so they come first and have more spans. Programs without a span end.
    """
    num_gates = tl.cdiv(GATES_M, BM)
    i_m, i_s = tl.program_id(0), tl.program_id(2)
    counter = counters
    if spans is not None:
        counter += tl.program_id(1) * tl.num_programs(0) + i_m
    if i_m < num_gates:
        if i_s * gates_span < N:
            gates_spans = spans
            if spans is not None:
                gates_spans += M
            compute_tile(
                x, None, gates_w, None, None, None, y + M, gates_spans, counter, i_m * BM,
                num_tokens, GATES_M, N, gates_span, x_stride, M + GATES_M, BM, BT, GATES_BK,
                None, 1, False,
            )  # fmt: skip
    elif i_s * span < N:
        compute_tile(
            rows, x_scale, w, scale, block_scale, None, y, spans, counter, (i_m - num_gates) * BM,
            num_tokens, M, N, span, rows_stride, M + GATES_M, BM, BT, BK, FORM, SPANS, EVEN,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Product:
    """Product with a prepared weight, for calls on one stream at a time."""

    weight: torch.Tensor | Words
    scale: torch.Tensor | None
    bias: torch.Tensor | None
    counters: torch.Tensor
    """int32: number of arrived spans of each tile of few tokens, zero between calls."""
    fp8_rows: bool = False
    """True to quantise x to fp8."""
    form: WordsForm | None = None
    """Of a weight in words, else None."""

    @classmethod
    def of(
        cls,
        weight: torch.Tensor | Words,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        fp8_rows: bool = False,
        form: WordsForm | None = None,
    ) -> Product:
        stored = weight.codes if isinstance(weight, Words) else weight
        return cls(weight, scale, bias, _counters(len(stored), stored.device), fp8_rows, form)

    @property
    def num_outputs(self) -> int:
        return len(self.weight.codes if isinstance(self.weight, Words) else self.weight)

    def span(self, size: int) -> int:
        """Return the elements of N per span, of N elements."""
        span = span_of(self.num_outputs, size)
        has_turns = self.form is not None or self.fp8_rows
        return triton.cdiv(span, 2 * SPAN) * 2 * SPAN if has_turns else span

    def takes_fp8_rows(self, size: int) -> bool:
        """Return True if rows of ``size`` elements can be quantised by the kernel before it."""
        return self.fp8_rows and size % SCALE_BLOCK == 0

    def __call__(self, x: torch.Tensor | QuantizedRows) -> torch.Tensor:
        x, quantized = (x.x, x) if isinstance(x, QuantizedRows) else (x, None)
        num_outputs, (num_tokens, size) = self.num_outputs, x.shape
        y = torch.empty(num_tokens, num_outputs, dtype=x.dtype, device=x.device)
        if num_tokens == 0:
            return y
        span = self.span(size)
        num_spans = triton.cdiv(size, span) if num_tokens <= FEW_TOKENS else 1
        rows, row_scale = self.rows(x, quantized)
        tile = self.tile(rows)
        tiles = triton.cdiv(num_outputs, tile["BM"]), triton.cdiv(num_tokens, tile["BT"])
        linear_kernel[(*tiles, num_spans)](
            rows,
            row_scale,
            self.weight,
            *scales_of(self.weight, self.scale),
            self.bias,
            y,
            *_spans_of(y, num_spans, self.counters),
            num_tokens,
            num_outputs,
            size,
            span,
            rows.stride(0),
            **tile,
        )
        return y

    def rows(
        self, x: torch.Tensor, quantized: QuantizedRows | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return x in the format that the kernel reads, and its scales or None. It is quantised
        once, because each program of a product reads all of x."""
        if not self.fp8_rows:
            return x, None
        return quantize_rows(x) if quantized is None else (quantized.rows, quantized.scale)

    def tile(self, x: torch.Tensor) -> dict[str, Any]:
        """Return tile and pipeline for ``rows(x)``, from the device's table if it has them."""
        if isinstance(self.weight, Words):
            tile = tile_config(len(x), x.dtype, torch.int8)
            if has_tensor_memory():  # Triton 3.7 compiles eight sums of 128 rows to nothing.
                tile |= {"BM": LEAST_ROWS, "num_warps": 4}
            return tile | words_config(self.form, x.shape[1], tile["BT"])
        tile = tile_config(len(x), x.dtype, self.weight.dtype)
        tile |= NO_WORDS
        if self.fp8_rows:
            return tile | fp8_config(x.shape[1], tile["BT"], is_large=tile["BM"] > LEAST_ROWS)
        if scales_of(self.weight, self.scale)[1] is None:
            key = x.dtype, self.weight.dtype, *self.weight.shape, token_class(len(x))
            tile |= tuned("linear.linear_kernel", *key)
        return tile


@dataclass(frozen=True, slots=True)
class Joined:
    """A product, and one of few outputs with a full-precision weight, in one launch. Each part has
    the bits that it has alone."""

    product: Product
    gates: Product
    counters: torch.Tensor

    def takes_fp8_rows(self, size: int) -> bool:
        return self.product.takes_fp8_rows(size)

    def __call__(self, x: torch.Tensor | QuantizedRows) -> torch.Tensor:
        x, quantized = (x.x, x) if isinstance(x, QuantizedRows) else (x, None)
        num_outputs, num_gates = self.product.num_outputs, self.gates.num_outputs
        num_tokens, size = x.shape
        y = torch.empty(num_tokens, num_outputs + num_gates, dtype=x.dtype, device=x.device)
        if num_tokens == 0:
            return y
        span, gates_span = self.product.span(size), self.gates.span(size)
        num_spans = triton.cdiv(size, min(span, gates_span)) if num_tokens <= FEW_TOKENS else 1
        rows, row_scale = self.product.rows(x, quantized)
        tile = self.product.tile(rows)
        num_tiles = triton.cdiv(num_outputs, tile["BM"]) + triton.cdiv(num_gates, tile["BM"])
        joined_kernel[(num_tiles, triton.cdiv(num_tokens, tile["BT"]), num_spans)](
            x,
            rows,
            row_scale,
            self.product.weight,
            *scales_of(self.product.weight, self.product.scale),
            self.gates.weight,
            y,
            *_spans_of(y, num_spans, self.counters),
            num_tokens,
            num_outputs,
            num_gates,
            size,
            span,
            gates_span,
            x.stride(0),
            rows.stride(0),
            GATES_BK=depth_of(x.dtype, self.gates.weight.dtype),  # type: ignore[union-attr]
            **tile,
        )
        return y


def _spans_of(
    y: torch.Tensor, num_spans: int, counters: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """Return memory for the spans of ``y`` with their counters, or None if there is one span."""
    if num_spans == 1:
        return None, None
    return y.new_empty(num_spans, *y.shape, dtype=torch.float32), counters


def _counters(num_outputs: int, device: torch.device) -> torch.Tensor:
    num_tiles = triton.cdiv(num_outputs, LEAST_ROWS) * triton.cdiv(FEW_TOKENS, LEAST_TOKENS)
    return torch.zeros(num_tiles, dtype=torch.int32, device=device)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute ``x @ weight.T + bias``; see ``reference.linear``.

    Sums in float32 and rounds once. x may be a view of wider rows. A prepared product saves the
    clearing of counters in each call.
    """
    return Product.of(weight, None, bias)(x)


def prepare(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Product:
    """Return ``linear`` with this weight."""
    return Product.of(weight.contiguous(), None, bias)


def linear_8bit(
    x: torch.Tensor, quantized: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute ``x @ (quantized * scale).T + bias`` with full-precision activations.

    See ``reference.linear_8bit``.
    """
    return Product.of(quantized, scale, bias)(x)


def prepare_8bit(
    quantized: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    fp8_rows: bool = False,
) -> Product:
    """Return ``linear_8bit`` with this weight, for x of any dtype, or ``linear_fp8``."""
    return Product.of(quantized, scale, bias, fp8_rows)


def linear_fp8(
    x: torch.Tensor, quantized: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute ``x @ (quantized * scale).T + bias`` with activations in fp8.

    See ``reference.linear_fp8``.
    """
    return Product.of(quantized, scale, bias, fp8_rows=True)(x)


def has_groups(format: GroupFormat) -> bool:
    """Return True if ``prepare_groups`` multiplies this format."""
    return has_words(format)


def prepare_groups(
    format: GroupFormat,
    fields: Mapping[str, torch.Tensor],
    num_columns: int,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> Product:
    """Return ``x @ weight.T + bias`` for a weight of 4 bits, with full-precision activations: the
    products of a group are added in float32, and then multiplied by its scale."""
    return Product.of(words_of(format, fields), None, bias, form=form_of(format))


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise activations to fp8, with the bits of ``reference.quantize_rows``."""
    num_tokens, size = x.shape
    num_blocks = triton.cdiv(size, SCALE_BLOCK)
    rows = x.new_empty(num_tokens, size, dtype=torch.float8_e4m3fn)
    scales = x.new_empty(num_tokens, num_blocks, dtype=torch.float32)
    if num_tokens:
        blocks = min(8, triton.next_power_of_2(num_blocks))
        quantize_rows_kernel[(num_tokens, triton.cdiv(num_blocks, blocks))](
            x, rows, scales, size, x.stride(0), BLOCKS=blocks
        )
    return rows, scales


def join(products: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> Callable[..., torch.Tensor]:
    """Return the product with the outputs of all ``products``; see ``reference.join``.

    One launch for a product and gates, which have at most ``MOST_GATES`` outputs.
    """
    if len(products) == 2:
        product, gates = products
        if (
            isinstance(product, Product)
            and isinstance(gates, Product)
            and product.bias is None
            and (gates.scale, gates.bias, gates.form) == (None, None, None)
            and gates.num_outputs <= MOST_GATES
        ):
            num_outputs = product.num_outputs + gates.num_outputs + LEAST_ROWS
            return Joined(product, gates, _counters(num_outputs, gates.counters.device))
    return reference.join(products)


def scales_of(
    weight: torch.Tensor | Words, scale: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return (one scale per row, or None; one scale per block of a row, or None)."""
    if scale is None or isinstance(weight, Words):
        return None, None
    return (None, scale) if scale.ndim == weight.ndim else (scale, None)


def span_of(num_outputs: int, size: int) -> int:
    """Return the elements of N per span for a weight ``[num_outputs, size]``.

    A multiple of 128, and at least 512 unless N is smaller.
    """
    wanted = PROGRAMS // triton.cdiv(num_outputs, 64)
    num_spans = max(1, min(wanted, size // LEAST_SPAN))
    return triton.cdiv(triton.cdiv(size, num_spans), 128) * 128


NO_WORDS: dict[str, Any] = {"FORM": None, "SPANS": 1, "EVEN": False}
"""Constants of kernels for weights that are not in words."""


def fp8_config(size: int, num_tokens: int, *, is_large: bool = False) -> dict[str, Any]:
    """Return the constants of products of fp8 rows with weights ``[M, size]``, for tiles of
    ``num_tokens``: two blocks per turn of a loop, or one if tiles are large."""
    spans = 1 if is_large or size % (2 * SCALE_BLOCK) else 2
    config = {"BK": SCALE_BLOCK, "SPANS": spans, "EVEN": size % (spans * SCALE_BLOCK) == 0}
    if spans == 2 and num_tokens > 32:
        config["num_stages"] = pipeline_stages(3)
    return NO_WORDS | config


def words_config(form: WordsForm | None, size: int, num_tokens: int) -> dict[str, Any]:
    """Return the constants of a weight in words ``[M, size]``, for tiles of ``num_tokens``.

    Two spans per turn of a loop, if rows have a whole number of turns and shared memory suffices.
    """
    is_large = num_tokens > 32
    spans = 2 if size % (2 * SPAN) == 0 and (has_roomy_memory() or not is_large) else 1
    return NO_WORDS | {
        "FORM": form,
        "SPANS": spans,
        "num_stages": pipeline_stages(3 if is_large else 4),
    }


def depth_of(dtype: torch.dtype, weight_dtype: torch.dtype) -> int:
    """Return BK: 128 bytes of a weight's row, or of a row of x in float32."""
    return 128 // (4 if dtype == torch.float32 else weight_dtype.itemsize)


def tile_config(num_tokens: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> dict[str, int]:
    """Return tile and pipeline for ``num_tokens`` rows of ``dtype``. Affects speed only.

    8-bit weights need a third accumulator, so their tile has half the size.
    """
    wide = num_tokens > FEW_TOKENS and dtype != torch.float32
    narrow = min(64, max(LEAST_TOKENS, triton.next_power_of_2(num_tokens)))
    tokens = 128 if wide and weight_dtype == dtype and dtype.itemsize > 1 else narrow
    return {
        "BM": 128 if wide else LEAST_ROWS,
        "BT": tokens,
        "BK": depth_of(dtype, weight_dtype),
        "num_warps": 8 if wide else 4,
        "num_stages": pipeline_stages(4),
    }
