"""Linear layers with ``native.cpp``, which sums every row in one order for any number of rows.

Rows need no padding. Otherwise as in ``reference``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from kernels import huge_pages
from kernels.linear import reference
from kernels.linear.reference import (
    PRODUCTS,
    join,
    linear,
    linear_8bit,
    linear_fp8,
    quantize,
    quantize_rows,
    widened,
)
from kernels.native import DTYPES, address, function, kernel_choices

__all__ = [
    "PRODUCTS",
    "ROWS",
    "join",
    "linear",
    "linear_8bit",
    "linear_fp8",
    "prepare",
    "prepare_8bit",
    "quantize",
    "quantize_rows",
]

ROWS = 1
"""Rows per padding unit, as ``reference.ROWS``."""
PANEL = 64
"""Outputs per panel of a packed weight."""


def prepare(
    weight: torch.Tensor, bias: torch.Tensor | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return ``linear`` with this weight ``[M, N]``, which is copied."""
    if not _is_served(weight):
        return reference.prepare(weight, bias)
    return NativeLinear(weight, None, bias)


def prepare_8bit(
    quantized: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    fp8_rows: bool = False,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return ``linear_8bit`` with this weight, for x of ``dtype``; ``linear_fp8`` is the
    reference's.

    int8 weights use int8 activations. fp8 weights with one scale per row are widened exactly.
    """
    if fp8_rows:
        return reference.prepare_8bit(quantized, scale, bias, dtype, fp8_rows=True)
    if quantized.dtype is torch.int8 and scale.ndim == 1:
        if dtype in DTYPES and kernel_choices()["linear_int8"] != "reference":
            return NativeInt8Linear(quantized, scale, bias)
        return reference.prepare_8bit(quantized, scale, bias, dtype)
    if scale.ndim == 1 and _is_served(exact := quantized.to(dtype)):
        return NativeLinear(exact, scale, bias)
    return prepare(widened(quantized, scale, dtype), bias)


def _is_served(weight: torch.Tensor) -> bool:
    """Return True if rows are whole 32-bit words of a dtype that this processor multiplies."""
    has_words = weight.shape[1] * weight.element_size() % 4 == 0
    return has_words and _method(weight.dtype) != "reference"


def _method(dtype: torch.dtype) -> str:
    return kernel_choices().get(f"linear_{DTYPES.get(dtype)}", "reference")


class NativeLinear:
    """Linear layer ``(x @ weight.T) * scale + bias`` for x ``[T, N]`` of the weight's dtype.

    ``scale``: float32 ``[M]`` or None. ``method``: of ``kernels.native.kernel_choices``, which is
    the default.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        method: str | None = None,
    ) -> None:
        self._num_outputs = len(weight)
        self._weight = pack(weight)
        self._bias = None if bias is None else bias.to(weight.dtype).contiguous()
        self._scale = None if scale is None else scale.contiguous()
        self._address = self._weight.data_ptr()
        self._steps = self._weight.shape[1]
        name = f"linear_{DTYPES[weight.dtype]}_{method or _method(weight.dtype)}"
        self._multiply = function(name, "piippppiit")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        num_rows, stride = x.shape[0], x.stride(0)
        if x.stride(1) != 1 or stride % 2:
            x = x.contiguous()
            stride = x.stride(0)
        out = x.new_empty(num_rows, self._num_outputs)
        self._multiply(
            x.data_ptr(), stride, num_rows, self._address, address(self._scale),
            address(self._bias), out.data_ptr(), self._steps, self._num_outputs,
            torch.get_num_threads(),
        )  # fmt: skip
        return out


class NativeInt8Linear:
    """Native version of ``int8.Int8Linear`` with equal bits in every method."""

    def __init__(
        self,
        quantized: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        method: str | None = None,
    ) -> None:
        self._num_outputs, self._size = quantized.shape
        self._weight = pack(F.pad(quantized, (0, -self._size % 4)))
        # The instruction takes unsigned rows: 128 is added to them, and this subtracted from sums.
        self._offsets = quantized.sum(dim=1, dtype=torch.int32).mul_(128)
        self._scale, self._bias = scale.contiguous(), bias
        self._name = f"linear_int8_{method or kernel_choices()['linear_int8']}"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.stride(1) != 1:
            x = x.contiguous()
        out = x.new_empty(x.shape[0], self._num_outputs)
        function(f"{self._name}_{DTYPES[x.dtype]}", "piiipppppit")(
            x.data_ptr(), x.stride(0), x.shape[0], self._size, self._weight.data_ptr(),
            self._offsets.data_ptr(), self._scale.data_ptr(),
            address(self._bias), out.data_ptr(),
            self._num_outputs, torch.get_num_threads(),
        )  # fmt: skip
        return out


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Pack ``[M, N]`` into panels of 64 outputs, word by word: int32 ``[panels, words, 64]``.

    Missing outputs of the last panel are zero.
    """
    words = weight.contiguous().view(torch.int32)
    num_outputs, num_words = words.shape
    panels = -(-num_outputs // PANEL)
    packed = huge_pages.empty(panels, num_words, PANEL, dtype=torch.int32)
    function("pack_words", "ppiit")(
        words.data_ptr(), packed.data_ptr(), num_outputs, num_words, torch.get_num_threads()
    )
    return packed
