"""Products of Qwen3-Next's layers: 2048 x 12288 (a GDN layer's input), 4096 x 2048 (its output), full precision and 8-bit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from experiments.kernel_cases import Case, Setup
from kernels.linear import fused, reference


def cases(setup: Setup) -> Iterator[Case]:
    """From one token to a prefill's worth, and 8-bit floats where the device has them."""
    formats = ["int8"]
    if setup.is_dry or torch.cuda.get_device_capability() >= (8, 9):
        formats.append("fp8")
    for size, num_outputs in ((70, 40),) if setup.is_dry else ((2048, 12288), (4096, 2048)):
        weight = setup.randn(num_outputs, size)
        for num_tokens in (1, 20) if setup.is_dry else (1, 16, 64, 1024, 8192):
            x = setup.randn(num_tokens, size)
            shape = f"{num_tokens} x {size} x {num_outputs}"
            yield _full(shape, x, weight)
            for format in formats:
                yield from _quantized(shape, x, weight, format, setup.is_dry)


def _full(shape: str, x: torch.Tensor, weight: torch.Tensor) -> Case:
    return Case(
        name=shape,
        run=partial(fused.linear, x, weight),
        expected=partial(_float32, x, weight),
        num_bytes=x.nbytes + weight.nbytes + x.element_size() * len(x) * len(weight),
        num_flops=2 * x.numel() * len(weight),
        rivals={"torch": partial(F.linear, x, weight)},
    )


def _quantized(
    shape: str, x: torch.Tensor, weight: torch.Tensor, format: reference.Format, is_dry: bool
) -> Iterator[Case]:
    quantized, scale = reference.quantize(weight, format)
    widened = quantized.float() * scale[:, None]
    rows = partial(fused.linear_8bit_rows, x, quantized, scale)
    # The interpreter's casts to fp8 lose a carry: rows in fp8 are right on a device only.
    rivals = {"torch, unquantised": partial(F.linear, x, weight)}
    if not (is_dry and format == "fp8"):
        rivals["ours, rows quantised too"] = rows
    yield Case(
        name=f"{format} {shape}",
        run=partial(fused.linear_8bit, x, quantized, scale),
        expected=partial(_float32, x, widened),
        num_bytes=x.nbytes + quantized.nbytes + x.element_size() * len(x) * len(weight),
        num_flops=2 * x.numel() * len(weight),
        rivals=rivals,
        tolerance=6e-2,  # what quantising costs: the rivals are held to the same result
    )


def _float32(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.float() @ weight.float().T
