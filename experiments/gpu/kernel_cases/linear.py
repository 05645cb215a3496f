"""Products of Qwen3-Next's layers in full precision, 8 and 4 bits.

Sizes are 2048 x 12288 (a GDN layer's input) and 4096 x 2048 (its output).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from experiments.gpu.kernel_cases import Case, Setup, num_bytes
from kernels.linear import fused, reference
from kernels.linear.formats import Matrix
from kernels.linear.grouped import Grouped


def plans(is_dry: bool) -> Iterator[tuple[Any, ...]]:
    """Yield products from one token to a prefill, with 8-bit floats if the device has them."""
    for sizes in ((80, 48),) if is_dry else ((2048, 12288), (4096, 2048)):
        for num_tokens in (1, 20) if is_dry else (1, 16, 64, 1024, 8192):
            yield full, num_tokens, *sizes
            yield fp8_rows, num_tokens, *sizes
            for format in ("int8", "fp8"):
                yield eight_bits, format, num_tokens, *sizes
                yield with_gates, format, num_tokens, *sizes
            for group in (128, 32):
                yield int4_in, group, num_tokens, *sizes


def _inputs(setup: Setup, num_tokens: int, *sizes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x, and the weight ``[outputs, inputs]``."""
    return setup.randn(num_tokens, sizes[0]), setup.randn(sizes[1], sizes[0])


def _product(
    run: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    parts: Sequence[torch.Tensor],
    exact: torch.Tensor,
    **more: Any,
) -> Case:
    """Return a case of the product of x with a weight that is stored as ``parts``."""
    return Case(
        run=partial(run, x),
        expected=lambda: x.double() @ exact.double().T,
        num_bytes=num_bytes((x, *parts)) + x.element_size() * len(x) * len(exact),
        num_flops=2 * x.numel() * len(exact),
        **more,
    )


def full(setup: Setup, *sizes: int) -> Case:
    x, weight = _inputs(setup, *sizes)
    rivals = {"torch": partial(F.linear, x, weight)}
    return _product(fused.prepare(weight), x, [weight], weight, rivals=rivals)


def _quantized(
    setup: Setup, format: Any, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return 8-bit numbers, their scales, and the exact weight."""
    setup.require(format)
    quantized, scale = reference.quantize(weight, format)
    return quantized, scale, quantized.double() * scale[:, None]


def eight_bits(setup: Setup, format: str, *sizes: int) -> Case:
    """Return a case with rivals that have full weights, and 8-bit rows.

    8-bit rows are less exact, at twice the rate of the tensor cores.
    """
    x, weight = _inputs(setup, *sizes)
    quantized, scale, widened = _quantized(setup, format, weight)
    rivals = {"torch, full weights": partial(F.linear, x, widened.to(x.dtype))}
    # A CPU had one scale for all rows in fp8 before torch 2.13.
    if format == "int8" or x.device.type != "cpu" or torch.__version__ >= (2, 13):
        by_format = {"int8": _torch_int8, "fp8": _torch_fp8}
        rivals["torch, rows in 8 bits"] = partial(by_format[format], x, quantized, scale)
    run = fused.prepare_8bit(quantized, scale, None, x.dtype)
    return _product(run, x, [quantized], widened, rivals=rivals, rival_tolerance=6e-2)


def fp8_rows(setup: Setup, *sizes: int) -> Case:
    """Return a case that quantises the rows, too, compared with the reference that does the
    same."""
    x, weight = _inputs(setup, *sizes)
    quantized, scale, _ = _quantized(setup, "fp8", weight)
    run = fused.prepare_8bit(quantized, scale, None, x.dtype, fp8_rows=True)
    case = _product(run, x, [quantized], weight)
    return replace(case, expected=partial(reference.linear_fp8, x, quantized, scale))


def int4_in(setup: Setup, group: int, *sizes: int) -> Case:
    """Return a case of the format of 4-bit checkpoints, in groups of columns."""
    x, weight = _inputs(setup, *sizes)
    matrix = Matrix.of(weight).quantized(Grouped(4, group))
    run = matrix.format.product(fused, matrix, None, x.dtype)
    return _product(run, x, [*matrix.fields.values()], matrix.widened(torch.float32))


def with_gates(setup: Setup, format: str, *sizes: int) -> Case:
    """Return a case with full-precision gates in the launch of an 8-bit product."""
    x, weight = _inputs(setup, *sizes)
    gates = setup.randn(64, sizes[1])
    quantized, scale, exact = _quantized(setup, format, weight)
    widened = torch.cat([exact, gates.double()])
    run = fused.join([fused.prepare_8bit(quantized, scale, None, x.dtype), fused.prepare(gates)])
    rivals = {"torch, full weights": partial(F.linear, x, widened.to(x.dtype))}
    return _product(run, x, [quantized, gates], widened, rivals=rivals)


def _torch_int8(x: torch.Tensor, quantized: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply with cuBLAS, which requires more than 16 rows and all sizes in multiples of 8."""
    rows, row_scale = reference.quantize(x, "int8")
    short, missing = max(32 - len(rows), 0), -x.shape[1] % 8
    rows, quantized = F.pad(rows, (0, missing, 0, short)), F.pad(quantized, (0, missing))
    product = torch._int_mm(rows, quantized.T)[: len(x)]
    return (product * row_scale[:, None] * scale).to(x.dtype)


def _torch_fp8(x: torch.Tensor, quantized: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply with torch, which requires sizes in multiples of 16 and returns bfloat16."""
    rows, row_scale = reference.quantize(x, "fp8")
    scales, whole = {"scale_a": row_scale[:, None], "scale_b": scale[None]}, torch.bfloat16
    return torch._scaled_mm(rows, quantized.T, **scales, out_dtype=whole).to(x.dtype)
