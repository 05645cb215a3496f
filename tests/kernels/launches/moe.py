"""Launches of Qwen3-Next's experts with the shared one, for few tokens and for a prefill, in
bfloat16 and 8-bit."""

from functools import partial

import torch
import triton

from kernels.linear.blocks import GGML_TYPES
from kernels.linear.formats import Matrix
from kernels.linear.grouped import Grouped
from kernels.linear.groups import GroupFormat
from kernels.linear.words import Words, form_of, words_of
from kernels.moe import fused
from kernels.moe.fused import experts, prepare_8bit, route_sigmoid
from kernels.norm.fused import rms_norm


def _experts(num_tokens: int) -> None:
    scores = torch.empty(num_tokens, 513, dtype=torch.bfloat16)
    live = torch.empty(num_tokens, dtype=torch.int64)
    product = fused.prepare(*_weights(torch.bfloat16))
    weights, chosen = product.route(scores[:, :512], 10, True, live=live)
    hidden = torch.empty(num_tokens, 2048, dtype=torch.bfloat16)
    sums = product.sums(hidden, weights, chosen, scores[:, 512:])
    rms_norm(sums, torch.empty(2048), 1e-6, residual=hidden)


def _experts_8bit(
    num_tokens: int, dtype: torch.dtype, *, in_blocks: bool = False, fp8_rows: bool = False
) -> None:
    target = triton.runtime.driver.active.get_current_target()
    if dtype != torch.int8 and (target.backend != "cuda" or target.arch < 89):
        return
    scores = torch.empty(num_tokens, 513, dtype=torch.bfloat16)
    hidden = torch.empty(num_tokens, 2048, dtype=torch.bfloat16)
    blocks = ((16,), (4,)) if in_blocks else ((), ())
    scales = torch.empty(513, 1024, *blocks[0]), torch.empty(513, 2048, *blocks[1])
    w13, w2 = _weights(dtype)
    product = prepare_8bit(w13, scales[0], w2, scales[1], hidden.dtype, fp8_rows=fp8_rows)
    weights, chosen = product.route(scores[:, :512], 10, True)
    product(hidden, weights, chosen, shared_gate=scores[:, 512:])


def _fp8_rows(num_tokens: int, *, in_blocks: bool = True) -> None:
    _experts_8bit(num_tokens, FP8, in_blocks=in_blocks, fp8_rows=True)


def _four_bits(num_tokens: int, format: GroupFormat) -> None:
    scores = torch.empty(num_tokens, 513, dtype=torch.bfloat16)
    hidden = torch.empty(num_tokens, 2048, dtype=torch.bfloat16)

    def stack(num_rows: int, num_columns: int) -> fused.Stack:
        """Return words that are those of one expert, because nothing reads them."""
        one = Matrix.empty(format, (1, num_rows, num_columns), torch.empty)
        tables = [
            None if table is None else table.expand(513, -1, -1)
            for table in words_of(format, one.fields)
        ]
        return fused.Stack(Words(*tables), None, num_rows, num_columns, form_of(format))

    product = fused.Prepared(stack(1024, 2048), stack(2048, 512))
    weights, chosen = product.route(scores[:, :512], 10, True)
    product(hidden, weights, chosen, scores[:, 512:])


def _weights(dtype: torch.dtype) -> list[torch.Tensor]:
    """Return both weights as expanded single elements, because nothing reads them."""
    element = torch.empty(1, 1, 1, dtype=dtype)
    return [element.expand(shape) for shape in ((513, 1024, 2048), (513, 2048, 512))]


def _without_gates() -> None:
    """Launch the experts of Nemotron 3 Nano, which have no gates."""
    logits = torch.empty(8, 128)
    weights, chosen = route_sigmoid(logits, torch.empty(128), 6, True, scale=2.5)
    element = torch.empty(1, 1, 1, dtype=torch.bfloat16)
    w1, w2 = element.expand(128, 1856, 2688), element.expand(128, 2688, 1856)
    experts(torch.empty(8, 2688, dtype=torch.bfloat16), weights, chosen, w1, w2)


SIZES = {"one": 1, "some": 64, "prefill": 2048}
"""Tokens of a launch by the end of its name."""
FP8 = torch.float8_e4m3fn
KINDS = {
    "": _experts,
    "int8_": partial(_experts_8bit, dtype=torch.int8),
    "fp8_": partial(_experts_8bit, dtype=FP8),
    "fp8_block_": partial(_experts_8bit, dtype=FP8, in_blocks=True),
}
LAUNCHES = {
    **{f"{kind}{size}": partial(KINDS[kind], SIZES[size]) for kind in KINDS for size in SIZES},
    "without_gates": _without_gates,
    "sigmoid": lambda: route_sigmoid(torch.empty(8, 256), torch.empty(256), 8, True, scale=2.4),
    "fp8_rows_one": lambda: _fp8_rows(1),
    "fp8_rows_some": lambda: _fp8_rows(64),
    "fp8_rows_prefill": lambda: _fp8_rows(8192),
    "fp8_rows_of_channels_prefill": lambda: _fp8_rows(2048, in_blocks=False),
    "int4_one": lambda: _four_bits(1, Grouped(4, 128)),
    "int4_some": lambda: _four_bits(64, Grouped(4, 128)),
    "int4_prefill": lambda: _four_bits(4096, Grouped(4, 128)),
    "int4_in_32_some": lambda: _four_bits(64, Grouped(4, 32)),
    "int4_in_32_prefill": lambda: _four_bits(4096, Grouped(4, 32)),
    "mxfp4_some": lambda: _four_bits(64, GGML_TYPES[39]),
    "q4_k_some": lambda: _four_bits(64, GGML_TYPES[12]),
}
