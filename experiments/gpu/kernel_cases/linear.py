"""Products of Qwen3-Next's layers in full precision and 8 bits.

Sizes are 2048 x 12288 (a GDN layer's input) and 4096 x 2048 (its output).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from engine.runner.device import Device
from experiments.gpu.kernel_cases import Case, Setup, num_bytes
from kernels.linear import fused, reference
from kernels.linear.formats import Matrix
from kernels.linear.grouped import Grouped
from kernels.linear.reference import Format


def cases(setup: Setup) -> Iterator[Case]:
    """Yield products from one token to a prefill, with 8-bit floats if the device supports them."""
    formats: list[Format] = ["int8"]
    if setup.is_dry or Device.resolve(setup.device).supports("fp8"):
        formats.append("fp8")
    for size, num_outputs in ((80, 48),) if setup.is_dry else ((2048, 12288), (4096, 2048)):
        weight = setup.randn(num_outputs, size)
        for num_tokens in (1, 20) if setup.is_dry else (1, 16, 64, 1024, 8192):
            x = setup.randn(num_tokens, size)
            shape = f"{num_tokens} x {size} x {num_outputs}"
            yield _full(shape, x, weight)
            for format in formats:
                yield _quantized(shape, x, weight, format)
            if "fp8" in formats:
                yield _fp8_rows(shape, x, weight)
            yield _joined(shape, x, weight, setup.randn(64, size), formats[-1])
            for group in (128, 32):
                yield _four_bits(shape, x, weight, group)


def _product(
    name: str,
    run: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    expected: Callable[[], torch.Tensor],
    **more: Any,
) -> Case:
    """Return a case of the product of x with ``weights`` ``[outputs, inputs]``."""
    num_outputs = sum(map(len, weights))
    return Case(
        name=name,
        run=partial(run, x),
        expected=expected,
        num_bytes=num_bytes((x, *weights)) + x.element_size() * len(x) * num_outputs,
        num_flops=2 * x.numel() * num_outputs,
        **more,
    )


def _full(shape: str, x: torch.Tensor, weight: torch.Tensor) -> Case:
    rivals = {"torch": partial(F.linear, x, weight)}
    expected = partial(_exact, x, weight)
    return _product(shape, fused.prepare(weight), x, [weight], expected, rivals=rivals)


def _quantized(shape: str, x: torch.Tensor, weight: torch.Tensor, format: Format) -> Case:
    """Return a case with rivals that have full weights, and 8-bit rows.

    8-bit rows are less exact, at twice the rate of the tensor cores.
    """
    quantized, scale = reference.quantize(weight, format)
    widened = quantized.double() * scale[:, None]
    rivals = {"torch, full weights": partial(F.linear, x, widened.to(x.dtype))}
    if format == "int8":
        rivals["torch, rows in 8 bits"] = partial(_torch_int8, x, quantized, scale)
    elif x.device.type != "cpu" or torch.__version__ >= (2, 13):  # CPUs had one scale for all rows
        rivals["torch, rows in 8 bits"] = partial(_torch_fp8, x, quantized, scale)
    run = fused.prepare_8bit(quantized, scale, None, x.dtype)
    more: dict[str, Any] = {"rivals": rivals, "rival_tolerance": 6e-2}
    expected = partial(_exact, x, widened)
    return _product(f"{format} {shape}", run, x, [quantized], expected, **more)


def _fp8_rows(shape: str, x: torch.Tensor, weight: torch.Tensor) -> Case:
    """Return a case that quantises the rows, too, compared with the reference that does the
    same."""
    quantized, scale = reference.quantize(weight, "fp8")
    run = fused.prepare_8bit(quantized, scale, None, x.dtype, fp8_rows=True)
    expected = partial(reference.linear_fp8, x, quantized, scale)
    return _product(f"fp8 and rows {shape}", run, x, [quantized], expected)


def _four_bits(shape: str, x: torch.Tensor, weight: torch.Tensor, group: int) -> Case:
    """Return a case of the format of 4-bit checkpoints, in groups of columns."""
    matrix = Matrix.of(weight).quantized(Grouped(4, group))
    run = matrix.format.product(fused, matrix, None, x.dtype)
    expected = partial(_exact, x, matrix.widened(torch.float32))
    return Case(
        name=f"int4 in {group} {shape}",
        run=partial(run, x),
        expected=expected,
        num_bytes=num_bytes((x, *matrix.fields.values())) + x.element_size() * len(x) * len(weight),
        num_flops=2 * x.numel() * len(weight),
    )


def _joined(
    shape: str, x: torch.Tensor, weight: torch.Tensor, gates: torch.Tensor, format: Format
) -> Case:
    """Return a case with full-precision gates in the launch of an 8-bit product."""
    quantized, scale = reference.quantize(weight, format)
    widened = torch.cat([quantized.double() * scale[:, None], gates.double()])
    run = fused.join([fused.prepare_8bit(quantized, scale, None, x.dtype), fused.prepare(gates)])
    rivals = {"torch, full weights": partial(F.linear, x, widened.to(x.dtype))}
    name, expected = f"{format} with gates {shape}", partial(_exact, x, widened)
    return _product(name, run, x, [quantized, gates], expected, rivals=rivals)


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
    product = torch._scaled_mm(
        rows,
        quantized.T,
        scale_a=row_scale[:, None],
        scale_b=scale[None],
        out_dtype=torch.bfloat16,
    )
    return product.to(x.dtype)


def _exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.double() @ weight.double().T
