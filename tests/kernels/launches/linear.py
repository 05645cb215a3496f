"""Launches of Qwen3-Next's input and output projections, for few tokens and for a prefill.

fp8 is launched only on targets that support it.
"""

from functools import partial

import torch
import triton

from kernels.linear import fused
from kernels.linear.blocks import GGML_TYPES
from kernels.linear.formats import Format, Matrix
from kernels.linear.fused import join, linear, prepare, prepare_8bit
from kernels.linear.grouped import Grouped


def linear_of(num_tokens: int, dtype: torch.dtype = torch.bfloat16) -> None:
    weight = torch.empty(1, 1, dtype=dtype).expand(12288, 2048)
    linear(torch.empty(num_tokens, 2048, dtype=dtype), weight)


def _fp8(num_tokens: int, *blocks: int, fp8_rows: bool = False) -> None:
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "cuda" and target.arch >= 89:
        _quantized(num_tokens, torch.float8_e4m3fn, *blocks, fp8_rows=fp8_rows)


def _quantized(num_tokens: int, dtype: torch.dtype, *blocks: int, fp8_rows: bool = False) -> None:
    x = torch.empty(num_tokens, 4096, dtype=torch.bfloat16)
    weight, scale = torch.empty(2048, 4096, dtype=dtype), torch.empty(2048, *blocks)
    prepare_8bit(weight, scale, None, x.dtype, fp8_rows=fp8_rows)(x)


def _four_bits(num_tokens: int, format: Format, *, is_joined: bool = False) -> None:
    matrix = Matrix.empty(format, (2048, 4096), torch.empty)
    product = format.product(fused, matrix, None, torch.bfloat16)
    if is_joined:
        product = join([product, prepare(torch.empty(64, 4096, dtype=torch.bfloat16))])
    product(torch.empty(num_tokens, 4096, dtype=torch.bfloat16))


def _joined(num_tokens: int, dtype: torch.dtype, *blocks: int, fp8_rows: bool = False) -> None:
    """Launch the input product of a Gated DeltaNet layer, whose gates are not quantised."""
    target = triton.runtime.driver.active.get_current_target()
    if dtype != torch.int8 and (target.backend != "cuda" or target.arch < 89):
        return
    weight = torch.empty(1, 1, dtype=dtype).expand(12288, 2048)
    gates = prepare(torch.empty(64, 2048, dtype=torch.bfloat16))
    scale = torch.empty(12288, *blocks)
    product = prepare_8bit(weight, scale, None, torch.bfloat16, fp8_rows=fp8_rows)
    join([product, gates])(torch.empty(num_tokens, 2048, dtype=torch.bfloat16))


SIZES = {"one": 1, "some": 64, "prefill": 512}
"""Tokens of a launch by the end of its name."""
KINDS = {
    "": linear_of,
    "int8_": lambda num_tokens: _quantized(num_tokens, torch.int8),
    "fp8_": _fp8,
    "fp8_block_": lambda num_tokens: _fp8(num_tokens, 32),
    "fp8_rows_": lambda num_tokens: _fp8(num_tokens, 32, fp8_rows=True),
    "int4_": lambda num_tokens: _four_bits(num_tokens, Grouped(4, 128)),
    "int4_in_32_": lambda num_tokens: _four_bits(num_tokens, Grouped(4, 32)),
}
LAUNCHES = {
    **{f"{kind}{size}": partial(KINDS[kind], SIZES[size]) for kind in KINDS for size in SIZES},
    "joined_int8_one": lambda: _joined(1, torch.int8),
    "joined_fp8_some": lambda: _joined(64, torch.float8_e4m3fn),
    "joined_fp8_prefill": lambda: _joined(512, torch.float8_e4m3fn),
    "float16_prefill": lambda: linear_of(512, torch.float16),
    "float32": lambda: linear_of(64, torch.float32),
    "fp8_rows_of_channels_prefill": lambda: _fp8(512, fp8_rows=True),
    "int4_zeros_one": lambda: _four_bits(1, Grouped(4, 128, True, torch.float16)),
    "int4_zeros_some": lambda: _four_bits(64, Grouped(4, 128, True, torch.float16)),
    "mxfp4_one": lambda: _four_bits(1, GGML_TYPES[39]),
    "q4_k_one": lambda: _four_bits(1, GGML_TYPES[12]),
    "joined_int4_one": lambda: _four_bits(1, Grouped(4, 128), is_joined=True),
    "joined_fp8_rows_one": lambda: _joined(1, torch.float8_e4m3fn, 16, fp8_rows=True),
    "joined_fp8_rows_prefill": lambda: _joined(512, torch.float8_e4m3fn, 16, fp8_rows=True),
}
